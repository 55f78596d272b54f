"""The PyTorch side: a module run and differentiated at a chosen precision, on a chosen device."""

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from jaxmodels.weights.names import as_numpy
from parity.compare.inputs import Inputs
from parity.compare.loss import Batch, Kinds, torch_loss
from parity.compare.noise import BLOCK, HUGE, RUNS, ULPS, Noise, Spread, of_spreads
from parity.compare.outputs import others_in, returned_leaves
from parity.compare.sides.torch_copy import cast, copied, slow_paths
from parity.compare.sides.wide_torch import Rounding, widened

KindNoises = dict[str, dict[str, Noise]]
NARROW = {getattr(torch, name): ulp for name, ulp in ULPS.items() if name != "float64"} | {
    torch.complex64: ULPS["float32"]
}


@contextlib.contextmanager
def strict_precision() -> Iterator[None]:
    """Run the block with full float32 matmuls: no TF32, no reduced precision."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")  # switches off TF32 in matmuls
    torch.backends.cudnn.allow_tf32 = False
    try:
        with slow_paths():
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class TorchSide:
    """A copy of a module in one dtype on one device, in evaluation mode.

    In float64 it runs with nothing narrowed (`wide_torch`); `casts` counts what was widened. In other dtypes it runs as
    it is.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: str):
        self.source = module
        self.module = copied(module, dtype, device).eval()
        self.dtype, self.device = dtype, device
        self.casts: collections.Counter[str] = collections.Counter()
        self.narrows: bool | None = None  # in a forward pass; None until there was one
        self.others: list[str] = []  # what the last call returned beside its tensors

    def again(self) -> "TorchSide":
        """Another copy of the module in the same dtype."""
        side = TorchSide(self.module, self.dtype, self.device)
        side.narrows = self.narrows
        return side

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run the block with nothing narrowed, if the side is in float64."""
        if self.dtype != torch.float64:
            yield
            return
        with widened(self.narrows is not False) as mode:
            yield
        self.casts |= mode.casts
        self.narrows = mode.replaced if self.narrows is None else self.narrows

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights, in this side's dtype."""
        return self.module.state_dict()

    def tensors(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """The inputs as tensors; floating ones in this side's dtype, with gradients."""
        tensors = {name: torch.tensor(value, device=self.device) for name, value in inputs.named().items()}
        floats = {name for name, tensor in tensors.items() if tensor.is_floating_point() or tensor.is_complex()}
        return {n: cast(t, self.dtype).requires_grad_() if n in floats else t for n, t in tensors.items()}

    def call(self, inputs: Inputs, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The outputs by name."""
        called = inputs.call(self.module, tensors, side="torch", dtype=self.dtype)
        self.others = others_in(called, torch.Tensor)
        return returned_leaves(called, torch.Tensor, "PyTorch")

    def outputs(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """The outputs alone."""
        with torch.no_grad(), self.running():
            outputs = as_arrays(self.call(inputs, self.tensors(inputs)))
        self.restore_buffers()
        return outputs

    def differentiate(
        self, batch: Batch, scale: float = 1.0
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Loss, outputs and input tensors after a backward pass; gradients are in the tensors and parameters.

        There is no backward pass if the loss depends on no parameter and no input. scale: a factor of the loss that is
        divided out of the gradients again; only their rounding depends on it.
        """
        labels: Any = batch.labels
        if labels is not None:
            labels = torch.as_tensor(labels, device=self.device, dtype=torch.long)
        targets = {n: cast(torch.tensor(t, device=self.device), self.dtype) for n, t in batch.targets.items()}
        if self.narrows is None and self.dtype == torch.float64:
            self.outputs(batch.inputs)  # a cheap pass that shows if anything is narrowed
        tensors = self.tensors(batch.inputs)
        self.module.zero_grad(set_to_none=True)
        with self.running():
            outputs = self.call(batch.inputs, tensors)
            loss = torch_loss(outputs, labels, targets)
            if loss.requires_grad:
                (loss * scale).backward()
        if scale != 1.0:
            for tensor in (*self.module.parameters(), *tensors.values()):
                if tensor.grad is not None:
                    tensor.grad /= scale
        self.restore_buffers()
        return loss, outputs, tensors

    def evaluate(self, batch: Batch, *, gradients: bool = True, scale: float = 1.0) -> Kinds:
        """Outputs, and the loss's gradients of parameters and inputs if asked for; scale: see `differentiate`."""
        if not gradients:
            return {"output": self.outputs(batch.inputs)}
        loss, outputs, tensors = self.differentiate(batch, scale)
        kinds = {"output": as_arrays(outputs)}
        if loss.requires_grad:
            parameters = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
            kinds["parameter gradients"] = {name: gradient(p) for name, p in parameters.items()}
            kinds["input gradients"] = {n: gradient(t) for n, t in tensors.items() if t.requires_grad}
        return {kind: tensors for kind, tensors in kinds.items() if tensors}

    def noises(
        self, batch: Batch, truth: Kinds, ulp: float, seed: int, *, runs: int = RUNS, operations: bool = False
    ) -> KindNoises:
        """The rounding noise of the results of `evaluate`, or of the outputs if `truth` has no others.

        operations: also move the result of every operation, which takes several times as long. The loss is scaled
        differently in each run. Otherwise a long sum of gradients, as over a large vocabulary, would round alike in all
        of them, because its terms move by less than the sum's last place.
        """
        spreads = {kind: {name: Spread(tensor) for name, tensor in tensors.items()} for kind, tensors in truth.items()}
        rng = np.random.default_rng(seed)
        for run in range(runs):
            with self.moved(ulp, rng), Rounding(ulp, run) if operations else contextlib.nullcontext():
                inputs = batch.inputs.moved(ulp, rng)
                gradients, scale = truth.keys() != {"output"}, rng.uniform(1, 2)
                found = self.evaluate(batch.with_inputs(inputs), gradients=gradients, scale=scale)
            for kind, of_kind in spreads.items():
                for name, spread in of_kind.items():
                    spread.add(found[kind][name], truth[kind][name])
            del found
        return {kind: of_spreads(of_kind, ulp) for kind, of_kind in spreads.items()}

    @contextlib.contextmanager
    def moved(self, ulp: float, rng: np.random.Generator) -> Iterator[None]:
        """Run the block with every parameter and floating buffer moved by up to `ulp`, relative to its size."""
        move(tensors_of(self.module).values(), ulp, rng)
        try:
            yield
        finally:
            self.restore()

    def restore(self) -> None:
        """Give parameters, buffers and other tensors of the module the source's values again."""
        copy_tensors(tensors_of(self.source), tensors_of(self.module))

    def restore_buffers(self) -> None:
        """Undo what a call changed in the module itself, as a counter of calls: the next call must be alike."""
        if not self.module.training:
            trained = {name for name, _ in self.module.named_parameters()}
            others = {name: tensor for name, tensor in tensors_of(self.module).items() if name not in trained}
            copy_tensors(tensors_of(self.source), others)

    def narrow_constants(self, carried: Callable[[str], bool]) -> dict[str, torch.Tensor]:
        """Tensors that the source holds in a narrow float and that Flax does not get: tables made at construction."""
        saved = {name for name in self.source.state_dict() if carried(name)}
        saved |= {name for name, parameter in self.source.named_parameters() if parameter.requires_grad}
        source = tensors_of(self.source)
        own = tensors_of(self.module)
        return {name: own[name] for name, t in source.items() if name not in saved and t.dtype in NARROW and t.numel()}

    @contextlib.contextmanager
    def moved_constants(self, constants: Mapping[str, torch.Tensor], rng: np.random.Generator) -> Iterator[None]:
        """Run the block with constants moved by up to one rounding to the dtype that the source holds them in."""
        source = tensors_of(self.source)
        for name, tensor in constants.items():
            move([tensor], NARROW[source[name].dtype], rng)
        try:
            yield
        finally:
            self.restore()


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, buffers and tensors in plain attributes, by name; those that are computed from others left out."""
    found = dict(module.named_parameters()) | dict(module.named_buffers())
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor) and not value.requires_grad:
                found[f"{path}.{name}".lstrip(".")] = value
    return found


def copy_tensors(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
    """Copy the values of tensors of one name and shape."""
    with torch.no_grad():
        for name, tensor in target.items():
            if name in source and source[name].shape == tensor.shape:
                tensor.copy_(source[name])


def move(tensors: Iterable[torch.Tensor], ulp: float, rng: np.random.Generator) -> None:
    """Move every floating element, in place, by up to `ulp` relative to its size; large tensors piece by piece."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    with torch.no_grad():
        for tensor in tensors:
            if not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            for part in (
                tensor.split(max(1, BLOCK * len(tensor) // tensor.numel())) if tensor.numel() > BLOCK else [tensor]
            ):
                by = torch.rand(part.shape, generator=generator, dtype=torch.float64).mul_(2 * ulp).sub_(ulp).add_(1.0)
                part.mul_(torch.where(part.abs() < HUGE, by.to(part.device), 1.0))


def gradient(tensor: torch.Tensor) -> np.ndarray:
    """The gradient of a tensor; zero if the loss does not depend on it."""
    return as_numpy(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)


def as_arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Tensors as NumPy arrays, by name."""
    return {name: as_numpy(tensor) for name, tensor in tensors.items()}
