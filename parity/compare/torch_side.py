"""The PyTorch half: run, differentiate and train a module, at a chosen precision and on a chosen device."""

import contextlib
import copy
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn

from jaxmodels.weights.names import as_numpy
from parity.compare.inputs import Inputs, named_leaves


def randomized(module: nn.Module, seed: int) -> nn.Module:
    """A copy in which every constant parameter (zeros, ones) is perturbed: what is zero hides how it is used.

    So are the running means and variances of a BatchNorm that has averaged nothing yet.
    """
    module = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if (parameter == parameter.flatten()[0]).all():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.3 * noise.to(parameter))
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "running_var")) and (buffer == buffer.flatten()[0]).all():
                noise = torch.randn(buffer.shape, generator=generator, dtype=torch.float64).to(buffer)
                buffer.copy_((0.3 * noise).exp() * buffer if name.endswith("var") else buffer + 0.3 * noise)
    return module


@contextlib.contextmanager
def strict_precision() -> Iterator[None]:
    """No TF32, no reduced-precision matmuls while it is open: float32 means float32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")  # turns off TF32 in matmuls
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class TorchSide:
    """A copy of a module in one dtype on one device, in evaluation mode."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: str):
        self.module = copy.deepcopy(module).to(device=device, dtype=dtype).eval()
        self.dtype, self.device = dtype, device

    def tensors(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """The inputs as tensors; floating ones in this side's dtype, asking for gradients."""
        tensors = {name: torch.as_tensor(value, device=self.device) for name, value in inputs.named().items()}
        return {
            name: tensor.to(self.dtype).requires_grad_() if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }

    def outputs(self, inputs: Inputs) -> dict[str, np.ndarray]:
        with torch.no_grad():
            return self.numpy(named_leaves(inputs.call(self.module, self.tensors(inputs)), torch.Tensor))

    def loss(self, outputs: dict[str, torch.Tensor], labels, targets) -> torch.Tensor:
        if labels is not None:
            labels = torch.as_tensor(labels, device=self.device, dtype=torch.long)
            (logits,) = outputs.values()
            return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        distances = [
            (output - torch.as_tensor(targets[name], device=self.device, dtype=self.dtype)).square().mean()
            for name, output in outputs.items()
        ]
        return torch.stack(distances).sum()

    def evaluate(self, inputs: Inputs, labels, targets) -> dict[str, dict[str, np.ndarray]]:
        """Outputs and the loss's gradients by kind, each tensor under its name."""
        tensors = self.tensors(inputs)
        self.module.zero_grad(set_to_none=True)
        outputs = named_leaves(inputs.call(self.module, tensors), torch.Tensor)
        self.loss(outputs, labels, targets).backward()
        parameters = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        kinds = {
            "output": self.numpy(outputs),
            "parameter gradients": {name: self.gradient(p) for name, p in parameters.items()},
            "input gradients": {n: self.gradient(t) for n, t in tensors.items() if t.requires_grad},
        }
        return {kind: tensors for kind, tensors in kinds.items() if tensors}

    @staticmethod
    def gradient(tensor: torch.Tensor) -> np.ndarray:
        gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        return as_numpy(gradient)

    @staticmethod
    def numpy(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        return {name: as_numpy(tensor) for name, tensor in tensors.items()}
