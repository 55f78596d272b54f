"""`check`: one PyTorch module against one Flax module, every reading that says whether they compute the same."""

import dataclasses
import functools
import glob
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx

from jaxmodels.weights.names import as_numpy
from parity.compare import jax_side, torch_side
from parity.compare.adapters import as_module
from parity.compare.inputs import Inputs, matches, random_targets, roll
from parity.compare.jax_side import FlaxSide
from parity.compare.names import Names, Weights, weights_of
from parity.compare.torch_side import TorchSide
from parity.locate.store import DEFAULT_LIMIT, check_limit
from parity.locate.trace import trace
from parity.locate.tree import Divergence
from parity.measure import limits
from parity.measure.optimizers import OPTIMIZERS, Kinds, flax_steps, outcome, torch_steps
from parity.report.report import Report
from parity.report.results import Check
from parity.report.stamp import environment

LEARNING_RATE = 1e-3
NOWHERE = "all sub-modules agree in the plain forward pass: look at what is fused, cached or a gradient"
ADAM = dataclasses.replace(OPTIMIZERS["adam"], moments={})  # which are not looked at here


def check(
    torch_module: torch.nn.Module,
    flax_module: nnx.Module | linen.Module,
    inputs: Any,
    *,
    names: Names | Weights | None = None,
    channels_last: Sequence[str] = (),
    labels: Any = None,
    zero_gradients: Sequence[str] = (),
    half: Sequence[str] = (),
    steps: int = 10,
    device: str | None = None,
    float64: bool | None = None,
    randomize: bool = True,
    seed: int = 0,
    name: str = "",
    memory_limit: int = DEFAULT_LIMIT,
    progress: Callable[[str], None] = lambda stage: None,
) -> Report:
    """Judges a Flax module, NNX or Linen, against a PyTorch module.

    Neither module is changed: copies of the PyTorch one give the weights to both sides. `inputs` are numpy arrays: one,
    a sequence of positional ones, or a mapping of named ones. `names`: what Flax calls the parts that PyTorch calls
    otherwise, see `parity.compare.names`; `parity.suggest` proposes it. `channels_last`: patterns of inputs and outputs
    ('x', 'input 0', 'output') that have their channels last in Flax and second in PyTorch. With `labels` (int, the
    logits' leading shape) the loss is the cross-entropy, else the squared distance to random targets. `zero_gradients`
    are patterns of parameter names whose gradients are zero in exact arithmetic: they are checked to be ~0 and held
    still in the training `steps`. `half` names 16-bit dtypes (bfloat16, float16) in which the outputs are compared too.
    device: 'cpu', 'gpu' or 'tpu', None for JAX's default; float64 None: whether the device has it. `randomize` perturbs
    constant parameters (zeros, ones) first. A part that differs is looked for at once, see `Report.divergence`:
    `memory_limit` is how many bytes of what goes in and out of PyTorch's sub-modules stay in memory then, the rest lies
    in a temporary folder. Raises ValueError for inputs that are no arrays and for a negative limit, and ConversionError
    where the weights do not fit.
    """
    check_limit(memory_limit)
    began = time.perf_counter()
    name = name or type(flax_module).__name__
    inputs, labels = Inputs.of(inputs), None if labels is None else np.asarray(labels)
    module = torch_side.randomized(torch_module, seed) if randomize else torch_module
    flax_module = as_module(flax_module, inputs, channels_last)
    weights = weights_of(module, flax_module, names)
    chosen = jax.devices(device)[0]
    float64 = chosen.platform != "tpu" if float64 is None else float64
    with torch_side.strict_precision(), jax_side.strict_precision(float64, chosen):
        readings = Readings(
            Pair(module, flax_module, weights, tuple(channels_last)),
            *(inputs, labels, zero_gradients, steps, chosen, float64, seed, progress, memory_limit),
        )
        checks = [*readings.all(), *map(readings.half, half)]
        failed = [c for c in checks if not c.passed]
        divergence = readings.divergence(failed) if failed else None
    skipped = {"where they part": NOWHERE} if failed and divergence is None else {}
    stamp = environment(chosen, float64, seed)
    return Report(name, checks, time.perf_counter() - began, stamp, divergence, skipped=skipped)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Both modules, and the way from one to the other."""

    torch: torch.nn.Module
    flax: nnx.Module
    weights: Weights
    channels_last: tuple[str, ...] = ()

    def side(self, state_dict: Mapping[str, Any], inputs: Inputs, dtype: Any) -> FlaxSide:
        """The Flax module with weights of the PyTorch one, in a dtype."""
        return FlaxSide(self.flax, state_dict, inputs, dtype, self.weights, self.channels_last)


class Readings:
    """The measurements of one check, each a `Check` with its limit."""

    def __init__(
        self, pair: Pair, inputs, labels, zero, steps, device, float64, seed, progress, memory_limit=DEFAULT_LIMIT
    ):
        module = pair.torch
        self.pair, self.module, self.inputs, self.labels = pair, module, inputs, labels
        self.zero, self.device, self.float64, self.progress = tuple(zero), device, float64, progress
        self.trace = functools.partial(trace, memory_limit=memory_limit)
        self.torch_device = "cuda" if device.platform == "gpu" and torch.cuda.is_available() else "cpu"
        still = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
        self.held = (*self.zero, *map(glob.escape, still))  # in training; what PyTorch does not train, nor do we
        progress("truth")
        self.truth_side = TorchSide(module, torch.float64, "cpu")
        # With labels the targets are read for the outputs' names alone, and one pass gives both.
        early = {} if labels is not None else self.truth_side.outputs(inputs)
        self.truth = self.truth_side.evaluate(inputs, labels, random_targets(early, seed))
        self.targets = random_targets(self.truth["output"], seed)
        self.batches = [(inputs.batch(step), None if labels is None else roll(labels, step)) for step in range(steps)]

    def all(self) -> Iterator[Check]:
        yield self.round_trip()
        if self.float64:
            side = self.pair.side(self.truth_side.module.state_dict(), self.inputs, jnp.float64)
            yield from self.agreement(side)
        yield from self.budget()

    def agreement(self, side: FlaxSide) -> Iterator[Check]:
        """Float64 against float64."""
        self.progress("float64")
        result = side.evaluate(self.inputs, self.labels, self.targets)
        for kind, tensors in self.truth.items():
            yield self.limited(kind, limits.errors(self.read(result, kind), tensors))
        yield from self.zeros(result)
        self.progress("decoding")
        yield from self.decoding(side)
        self.progress("training")
        truth, trained = self.trained(self.truth_side), self.trained(side)
        for kind in truth:
            yield self.limited(kind, limits.errors(trained[kind], truth[kind]))

    def budget(self) -> Iterator[Check]:
        """Float32 on both sides, each against the truth."""
        self.progress("float32")
        theirs = TorchSide(self.module, torch.float32, self.torch_device)
        ours = self.pair.side(theirs.module.state_dict(), self.inputs, jnp.float32)
        arguments = (self.inputs, self.labels, self.targets)
        result, own = ours.evaluate(*arguments), theirs.evaluate(*arguments)
        for kind, tensors in self.truth.items():
            yield self.limited(kind, limits.ratios(self.read(result, kind), own[kind], tensors), precision="float32")
        if self.float64:
            return
        yield from self.decoding(ours)
        truth, own, result = self.trained(self.truth_side), self.trained(theirs), self.trained(ours)
        for kind in truth:
            yield self.limited(kind, limits.ratios(result[kind], own[kind], truth[kind]), precision="float32")

    def trained(self, side: TorchSide | FlaxSide) -> Kinds:
        """The losses of all steps with Adam, and the parameters after them."""
        rates = [LEARNING_RATE] * len(self.batches)
        run = (self.batches, self.targets, self.held, ADAM, rates)
        return outcome(torch_steps(side, *run) if isinstance(side, TorchSide) else flax_steps(side, *run))

    def half(self, name: str) -> Check:
        """16 bits on both sides. The truth has the same rounded weights: what rounding them costs is not computing."""
        self.progress(name)
        dtype = getattr(torch, name)
        inputs = self.inputs.rounded(as_numpy(torch.empty(0, dtype=dtype)).dtype)
        theirs = TorchSide(self.module, dtype, self.torch_device)
        ours = self.pair.side(theirs.module.state_dict(), inputs, jnp.dtype(name))
        truth = TorchSide(theirs.module, torch.float64, "cpu").outputs(inputs)
        ratios = limits.ratios(ours.outputs(inputs), theirs.outputs(inputs), truth)
        return self.limited("output", ratios, precision=name)

    def read(self, result: dict, kind: str) -> dict:
        """Flax's tensors of a kind, without the gradients of parameters that PyTorch does not train."""
        still = self.held[len(self.zero) :]
        return {name: tensor for name, tensor in result.get(kind, {}).items() if not matches(name, still)}

    def zeros(self, result: dict) -> Iterator[Check]:
        """Gradients declared to be zero, on both sides, in units of the largest gradient."""
        if not self.zero:
            return
        truth = self.truth["parameter gradients"]
        scale = limits.scale_of(truth)
        both = {**{f"torch {n}": g for n, g in truth.items()}, **result["parameter gradients"]}
        declared = {n: g for n, g in both.items() if matches(n.removeprefix("torch "), self.zero)}
        if not declared:
            raise ValueError(f"zero_gradients={list(self.zero)} match no parameter of {sorted(truth)}")
        yield self.limited("zero gradients", {n: float(np.abs(g).max()) / scale for n, g in declared.items()})

    def decoding(self, side: FlaxSide) -> Iterator[Check]:
        """Logits through the cache against PyTorch's full forward pass, for models that have a cache."""
        if not hasattr(self.pair.flax, "prefill"):
            return
        ids, *_ = self.inputs.named().values()
        first, logits = side.decode(ids, **self.inputs.for_decoding())
        axis = side.module.sequence_axis
        positions = np.arange(first, ids.shape[axis])
        truth = {name: output.take(positions, axis) for name, output in self.truth["output"].items()}
        if self.float64:
            yield self.limited("cached decoding", limits.errors({"output": logits}, truth))
            return
        own = TorchSide(self.module, torch.float32, "cpu").outputs(self.inputs)
        own = {name: output.take(positions, axis) for name, output in own.items()}
        yield self.limited("cached decoding", limits.ratios({"output": logits}, own, truth), precision="float32")

    def round_trip(self) -> Check:
        """PyTorch -> Flax -> PyTorch in the module's own dtypes: how many tensors come back with another bit."""
        weights = self.pair.weights
        original = {n: as_numpy(t) for n, t in self.module.state_dict().items() if weights.carries(n)}
        with jax.enable_x64(True):
            back = weights.read(weights.load(self.pair.flax, self.module.state_dict()))
        changed = {name: float(not same_bits(array, back.get(name))) for name, array in original.items()}
        return Check("round trip", "bits", *limits.worst(changed or {"": 0.0}), 0.0)

    def limited(self, kind: str, values: dict[str, float], precision: str = "float64") -> Check:
        limit = limits.FLOAT64_LIMIT if precision == "float64" else limits.RATIO_LIMIT
        return Check(kind, precision, *limits.worst(values), limit)

    def divergence(self, failed: Sequence[Check]) -> Divergence | None:
        """The first sub-module that differs, traced in float64 on the CPU whatever the device.

        Gradients are traced where all outputs agree, and a narrower dtype where only that one failed.
        """
        self.progress("tracing")
        objective = {"labels": self.labels, "targets": self.targets}
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            side = self.pair.side(self.truth_side.module.state_dict(), self.inputs, jnp.float64)
            found = self.trace(self.truth_side, side, self.inputs).divergence
            wide = [check for check in failed if check.precision == "float64" or not self.float64]
            if found is None and any("gradients" in check.kind or "train" in check.kind for check in wide):
                found = self.trace(self.truth_side, side, self.inputs, **objective).divergence
        narrow = [check.precision for check in failed if check.precision not in ("float64", "bits")]
        if found is None and narrow and not wide:
            found = self.narrow_trace(narrow[0])
        return found

    def narrow_trace(self, name: str) -> Divergence | None:
        """In a narrower dtype, on the device, with the same rounded weights in the truth."""
        theirs = TorchSide(self.module, getattr(torch, name), "cpu")
        inputs = self.inputs.rounded(as_numpy(torch.empty(0, dtype=theirs.dtype)).dtype)
        side = self.pair.side(theirs.module.state_dict(), inputs, jnp.dtype(name))
        return self.trace(TorchSide(theirs.module, torch.float64, "cpu"), side, inputs).divergence


def same_bits(a: np.ndarray, b: np.ndarray | None) -> bool:
    return b is not None and a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
