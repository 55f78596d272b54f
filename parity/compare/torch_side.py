"""The PyTorch side: a module run and differentiated at a chosen precision, on a chosen device."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from jaxmodels.weights.names import as_numpy
from parity.compare.inputs import Inputs, named_leaves
from parity.compare.loss import Batch, Kinds, torch_loss


@contextlib.contextmanager
def strict_precision() -> Iterator[None]:
    """Run the block with full float32 matmuls: no TF32, no reduced precision."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")  # switches off TF32 in matmuls
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

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights, in this side's dtype."""
        return self.module.state_dict()

    def tensors(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """The inputs as tensors; floating ones in this side's dtype, with gradients."""
        tensors = {name: torch.as_tensor(value, device=self.device) for name, value in inputs.named().items()}
        return {
            name: tensor.to(self.dtype).requires_grad_() if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }

    def call(self, inputs: Inputs, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The outputs by name."""
        return named_leaves(inputs.call(self.module, tensors), torch.Tensor)

    def outputs(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """The outputs alone."""
        with torch.no_grad():
            return as_arrays(self.call(inputs, self.tensors(inputs)))

    def differentiate(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Loss, outputs and input tensors after a backward pass; gradients are in the tensors and parameters."""
        labels: Any = batch.labels
        if labels is not None:
            labels = torch.as_tensor(labels, device=self.device, dtype=torch.long)
        targets = {n: torch.as_tensor(t, device=self.device, dtype=self.dtype) for n, t in batch.targets.items()}
        tensors = self.tensors(batch.inputs)
        self.module.zero_grad(set_to_none=True)
        outputs = self.call(batch.inputs, tensors)
        loss = torch_loss(outputs, labels, targets)
        loss.backward()
        return loss, outputs, tensors

    def evaluate(self, batch: Batch) -> Kinds:
        """Outputs, and the loss's gradients of parameters and inputs."""
        _, outputs, tensors = self.differentiate(batch)
        parameters = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        kinds = {
            "output": as_arrays(outputs),
            "parameter gradients": {name: gradient(p) for name, p in parameters.items()},
            "input gradients": {n: gradient(t) for n, t in tensors.items() if t.requires_grad},
        }
        return {kind: tensors for kind, tensors in kinds.items() if tensors}


def gradient(tensor: torch.Tensor) -> np.ndarray:
    """The gradient of a tensor; zero if the loss does not depend on it."""
    return as_numpy(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)


def as_arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Tensors as NumPy arrays, by name."""
    return {name: as_numpy(tensor) for name, tensor in tensors.items()}
