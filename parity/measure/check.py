"""`check`: the readings that decide if a Flax module computes the same as a PyTorch module."""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch
from flax import linen, nnx

from parity.checkpoint.opened import Source
from parity.compare import noise
from parity.compare.arguments import modules
from parity.compare.comparison import Comparison
from parity.compare.decoding import NotDecodable, decodes
from parity.compare.loss import Batch, Kinds
from parity.compare.names import Names
from parity.compare.noise import LIMIT, ULPS
from parity.compare.outputs import left_out, unmatched
from parity.compare.sides.functions import Function
from parity.compare.sides.jax_side import JaxSide
from parity.compare.sides.torch_side import TorchSide
from parity.compare.store import DEFAULT_LIMIT, Store, Stored, check_limit, store
from parity.compare.weights import Weights
from parity.locate.trace import trace
from parity.locate.tree import Divergence
from parity.measure.explain import NAMED, Changes, add_torch_constants, explained
from parity.measure.memory import free, too_large
from parity.measure.optimizers import OPTIMIZERS, Training
from parity.measure.plain import fused, has_plain
from parity.measure.reference import Reference, Values, judged, judged_narrow, round_trip, unlimited
from parity.measure.refine import doubtful, refined, rescaled
from parity.measure.train_mode import TRAINING_MODE, in_training, train_mode
from parity.report.report import Report
from parity.report.results import Check
from parity.report.stamp import environment

READINGS = ("output", "round trip", "gradients", "decoding", "training")
SHARE = 16  # part of the memory limit that results of PyTorch may take
ONE_SIDED = "all that differs are gradients that one side alone has, see the notes"
LEARNING_RATE = 1e-3
NOWHERE = "all sub-modules agree in the plain forward pass: look at fused or cached code, and at gradients"


def adam(parameters: Sequence[torch.Tensor], learning_rate: float) -> torch.optim.Optimizer:
    """PyTorch's Adam; fused if it can be, which needs no temporary copies of a parameter."""
    return torch.optim.Adam(parameters, learning_rate, fused=all(p.is_floating_point() for p in parameters))


ADAM = dataclasses.replace(OPTIMIZERS["adam"], torch=adam, moments={})  # a check does not read its moments


def check(
    torch_module: torch.nn.Module | Source,
    flax_module: nnx.Module | linen.Module | Function | str | os.PathLike,
    inputs: Any,
    *,
    names: Names | Weights | None = None,
    layouts: Mapping[str, str] | None = None,
    torch_only: Sequence[str] = (),
    flax_only: Sequence[str] = (),
    torch_kwargs: Mapping[str, Any] | None = None,
    flax_kwargs: Mapping[str, Any] | None = None,
    channels_last: Sequence[str] = (),
    labels: Any = None,
    zero_gradients: Sequence[str] = (),
    readings: Sequence[str] = READINGS,
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
    """Compare a Flax module with a PyTorch module: outputs, gradients, decoding, training.

    flax_module: an NNX or Linen module, or `parity.Function(apply, params)` for other libraries. Neither module is
    changed: both sides get their weights from copies of the PyTorch module. For this project's models torch_module may
    be a checkpoint (a state_dict, a file or a folder), and flax_module a folder; see `parity.checkpoint`. inputs: an
    array, a sequence of positional arguments, or a mapping of named ones; see `parity.compare.inputs`.

    names: Flax's names of parts that PyTorch names differently, see `parity.compare.names`; `parity.suggest` proposes
        them. Also a converter of your own, a function from the state_dict to Flax's parameters, which is then tested
    layouts: by pattern of a PyTorch name, how its axes lie in Flax: {"*.qkv.weight": "(h three d) i -> three h i d"}
    torch_only, flax_only: patterns of tensors and arrays without a counterpart; they keep their own values
    torch_kwargs, flax_kwargs: constants that only one side's call takes, such as `deterministic=True`
    channels_last: patterns of inputs and outputs ('x', 'input 0', 'output') that have their channels last in Flax and
        second in PyTorch
    labels: int, of the logits' leading shape, -100 is ignored: the loss is the cross-entropy (default: the squared
        distance to random targets)
    zero_gradients: patterns of parameters whose gradients are zero in exact arithmetic; the gradients are checked to be
        ~0, and the parameters are not trained
    readings: those of READINGS that are wanted; ('output',) needs the least time and memory
    half: 16-bit dtypes ('bfloat16', 'float16') in which outputs are also compared
    steps: number of training steps with Adam
    device: 'cpu', 'gpu' or 'tpu' (default: JAX's own)
    float64: run Flax in float64 (default: if the device supports it)
    randomize: perturb constant parameters and buffers (zeros, ones) first

    Every value is in units of the tensor's own rounding noise, see `parity.compare.noise`. If a reading fails, the
    sub-module that explains it is located, see `Report.divergence`. memory_limit: bytes of PyTorch's activations kept
    in memory for that; the rest is written to a temporary folder. Raises ValueError for arguments of another kind and
    for a negative limit, and ConversionError if the weights do not fit.
    """
    check_limit(memory_limit)
    if set(readings) - set(READINGS) or "output" not in readings:
        raise ValueError(f"readings={list(readings)} must contain output, and further of {', '.join(READINGS[1:])}")
    modules(torch_module, flax_module, both=True)
    comparison = Comparison.of(
        torch_module,
        flax_module,
        inputs,
        labels=labels,
        names=names,
        layouts=layouts,
        torch_only=torch_only,
        flax_only=flax_only,
        torch_kwargs=torch_kwargs,
        flax_kwargs=flax_kwargs,
        channels_last=channels_last,
        zero_gradients=zero_gradients,
        device=device,
        float64=float64,
        randomize=randomize,
        seed=seed,
    )
    given = comparison.flax if isinstance(flax_module, str | os.PathLike) else flax_module
    name = name or type(given).__name__
    return read_check(
        comparison,
        name=name,
        readings=readings,
        half=half,
        steps=steps,
        memory_limit=memory_limit,
        progress=progress,
    )


def read_check(
    comparison: Comparison,
    *,
    name: str = "",
    readings: Sequence[str] = READINGS,
    half: Sequence[str] = (),
    steps: int = 10,
    memory_limit: int = DEFAULT_LIMIT,
    progress: Callable[[str], None] = lambda stage: None,
) -> Report:
    """`check` on a resolved comparison."""
    began = time.perf_counter()
    divergence = None
    with comparison.strict_precision(), store(memory_limit // SHARE) as kept:
        measured = Readings(comparison, steps, progress, kept=kept, readings=readings)
        checks = [*measured.all(), *map(measured.half, half)]
        failed = [check for check in checks if not check.passed]
        nowhere = NOWHERE
        if failed:
            progress("tracing")
            evaluated = [check for check in failed if check.kind not in TRAINING_MODE]
            if evaluated and measured.one_sided(evaluated):
                nowhere = ONE_SIDED
            elif evaluated:
                try:
                    divergence = located(comparison, measured.side, measured.reference.batch, evaluated, memory_limit)
                except Exception as error:  # the readings stand without it
                    nowhere = f"the trace failed: {type(error).__name__}: {error}"
            divergence = divergence or in_training(failed)
    skipped = dict(measured.skipped)
    if failed and divergence is None:
        skipped["first divergence"] = nowhere
    stamp = environment(comparison.device, comparison.float64, comparison.seed)
    notes = (*comparison.notes, *measured.notes)
    return Report(name, checks, time.perf_counter() - began, stamp, divergence, skipped=skipped, notes=notes)


class Readings:
    """The measurements of one check, each a `Check` with its limit.

    Large models set the order: a side is made when it is needed and dropped before the next, and PyTorch's results
    beyond `memory_limit` are in files of the store `kept`.
    """

    def __init__(
        self,
        comparison: Comparison,
        steps: int = 0,
        progress: Callable[[str], None] = lambda stage: None,
        *,
        kept: Store | None = None,
        readings: Sequence[str] = READINGS,
    ):
        self.comparison, self.progress, self.readings = comparison, progress, readings
        self.skipped: dict[str, str] = {}
        self.notes: list[str] = []
        self.known: TorchSide | None = None
        self.over: set[str] = set()  # tensors beyond their limit in float64
        self.narrows: bool | None = None
        for reading, reason in too_large(comparison, [r for r in readings if r != "output"]):
            self.skipped[reading] = reason
        self.gradients = self.does("gradients")
        self.stored: Callable[[Kinds], Kinds] = lambda kinds: kinds
        if kept is not None:
            self.stored = lambda kinds: {kind: Stored(kept, tensors) for kind, tensors in kinds.items()}
        progress("reference")
        batch, kinds = comparison.evaluated(self.side, gradients=self.gradients)
        kinds = self.stored(kinds)
        progress("noise")
        noises = self.side.noises(batch, kinds, ULPS["float64"], comparison.seed)
        self.reference = Reference(comparison, batch, kinds, noises)
        self.notes += self.reference.notes
        batches = [batch.varied(step) for step in range(steps if self.does("training") else 0)]
        self.training = Training(ADAM, batches, [LEARNING_RATE] * steps, comparison.frozen)

    def one_sided(self, failed: Sequence[Check]) -> bool:
        """True if nothing failed but gradients of what is a parameter on one side alone."""
        sided = getattr(self.comparison.weights, "one_sided", None)
        names = self.over | {check.worst for check in failed}
        return sided is not None and names <= {key for keys in sided.found.values() for key in keys}

    def does(self, reading: str) -> bool:
        """True for a reading that was asked for and fits into the memory."""
        return reading in self.readings and reading not in self.skipped

    @property
    def side(self) -> TorchSide:
        """PyTorch in float64, made anew if it was dropped."""
        if self.known is None:
            self.known = self.comparison.torch_side("float64")
            self.known.narrows = self.narrows
        return self.known

    def drop_side(self) -> None:
        """Free the memory of PyTorch's side in float64."""
        if self.known is not None:
            self.narrows, self.known = self.known.narrows, None
        free(self.comparison)

    def all(self) -> Iterator[Check]:
        """Every reading in the precisions that the device supports."""
        if "round trip" in self.readings:
            yield round_trip(self.comparison)
        yield from self.both() if self.comparison.float64 else self.narrow_alone()

    def both(self) -> Iterator[Check]:
        """Float64 with nothing narrowed, which says if the mathematics is the same, and float32 as the modules run."""
        casts = self.side.casts
        self.drop_side()
        self.progress("float32")
        narrow, own = self.narrow()
        self.progress("float64")
        ours = self.comparison.jax_side("float64")
        result = ours.evaluate(self.reference.batch, gradients=self.gradients)
        values, narrow, own = self.refined(self.reference.values(result), narrow, own)
        why = explained(self.reference, self.add_constants, ours, result, values, narrow)
        self.notes += [*unmatched(self.reference.kinds["output"], result["output"])]
        self.notes += [*widened_notes(casts, ours), *why.notes]
        self.over = {n for kind, of in values.items() for n, v in of.items() if not v <= why.limits[kind][n]}
        for kind, of_kind in values.items():
            yield judged(kind, "float64", of_kind, why.limits[kind])
        yield from self.reference.zeros(result)
        outputs = {"output": result["output"]}
        del result
        free(self.comparison)
        if has_plain(ours.module):
            self.progress("plain form")
            yield from fused(ours, self.reference, outputs)
        self.progress("decoding")
        yield from self.decoding(ours, limit=LIMIT * why.allowed)
        self.progress("training mode")
        yield from train_mode(self.comparison, lambda: self.side, ours, self.skipped, self.notes)
        self.drop_side()
        yield from self.trained(ours, why.allowed)
        for kind, of_kind in narrow.items():
            yield judged_narrow(kind, "float32", of_kind, own[kind], why.rounding.get(kind))

    def refined(self, wide: Values, narrow: Values, own: Values) -> tuple[Values, Values, Values]:
        """Values in float64 and float32, with the noise of tensors that are over their limits by little refined."""
        tensors = doubtful(wide, narrow, own)
        if not tensors:
            return wide, narrow, own
        self.progress("noise of every operation")
        named = some([f"{kind} of {name}" for kind, names in tensors.items() for name in names])
        self.notes.append(f"noise measured again, with the result of every operation moved: {', '.join(named)}")
        before = self.reference
        self.reference = refined(before, lambda: self.side, tensors)
        self.drop_side()
        wide, narrow, own = (rescaled(values, before, self.reference) for values in (wide, narrow, own))
        return wide, narrow, own

    def add_constants(self, changes: Changes) -> None:
        """Add how far results move with the narrow constants of PyTorch's side."""
        add_torch_constants(changes, self.reference, self.side)

    def narrow(self) -> tuple[Values, Values]:
        """Values of Flax and PyTorch in float32, as the modules run; one side after the other."""

        def values(side: TorchSide | JaxSide) -> Values:
            return self.reference.values(side.evaluate(self.reference.batch, gradients=self.gradients), "float32")

        theirs = self.comparison.torch_side("float32", self.comparison.torch_device)
        own, others = values(theirs), theirs.others
        del theirs
        ours = self.comparison.jax_side("float32")
        with self.comparison.strict_precision(False):  # with float64 enabled, NumPy's scalars would widen the port
            found = values(ours)
        self.notes += left_out(others, ours.others)
        del ours
        free(self.comparison)
        return found, own

    def narrow_alone(self) -> Iterator[Check]:
        """Float32 on a device without float64."""
        self.drop_side()
        self.progress("float32")
        _, values, own = self.refined({}, *self.narrow())
        self.notes += unlimited(own, "float32")
        for kind, of_kind in values.items():
            yield judged_narrow(kind, "float32", of_kind, own[kind])
        ours = self.comparison.jax_side("float32")
        self.progress("decoding")
        yield from self.decoding(ours, self.comparison.torch_side("float32").outputs(self.comparison.inputs))
        yield from self.trained(ours)

    def trained(self, ours: JaxSide, allowed: float = 1.0) -> Iterator[Check]:
        """Losses and parameters of a short training, which spends `ours`; allowed: the largest value that passed."""
        if not self.training.batches:
            return
        self.progress("training")

        def side() -> TorchSide:
            free(self.comparison)
            fresh = self.comparison.torch_side("float64")
            fresh.narrows = self.narrows
            return fresh

        precision = ours.dtype.name
        result = self.stored(self.training.outcome(ours))
        free(self.comparison)
        truth = self.stored(self.training.outcome(side()))
        if not truth:
            return
        noises = self.training.noises(side, truth, ULPS[precision] * max(1.0, allowed), self.comparison.seed)
        for kind, tensors in truth.items():
            yield judged(kind, precision, noise.errors(result[kind], tensors, noises[kind]))

    def decoding(
        self, ours: JaxSide, own_outputs: Mapping[str, np.ndarray] | None = None, limit: float = LIMIT
    ) -> Iterator[Check]:
        """Logits through the cache, for models that decode."""
        if not decodes(ours.module) or not self.does("decoding"):
            return
        try:
            yield self.reference.decoding(ours, own_outputs=own_outputs, limit=limit)
        except NotDecodable as reason:
            self.skipped["cached decoding"] = str(reason)

    def half(self, dtype: str) -> Check:
        """Outputs in 16 bits on both sides, as the modules run."""
        self.progress(dtype)
        sides = self.comparison.sides(dtype, self.comparison.torch_device)
        truth = {"output": sides.reference.outputs(sides.inputs)}
        batch = self.comparison.batch(truth["output"], sides.inputs)
        noises = sides.reference.noises(batch, truth, ULPS[dtype], self.comparison.seed)["output"]
        ours, theirs = (
            noise.errors(s.outputs(sides.inputs), truth["output"], noises) for s in (sides.jax, sides.torch)
        )
        return judged_narrow("output", dtype, ours, theirs)


def widened_notes(of_torch: Mapping[str, int], flax: JaxSide) -> Iterator[str]:
    """Notes on what was widened on each side, and what could not be."""
    for side, casts in (("Flax", flax.casts), ("PyTorch", of_torch)):
        if casts:
            yield f"widened to float64 in {side}: {', '.join(some(list(casts)))}"
    if flax.kept:
        yield f"not widened in Flax: {', '.join(some(flax.kept))}"


def some(texts: Sequence[str]) -> list[str]:
    """The first texts, and the number of the others."""
    return [*texts[:NAMED], *([f"{len(texts) - NAMED} more"] if len(texts) > NAMED else [])]


def located(
    comparison: Comparison, side: TorchSide, batch: Batch, failed: Sequence[Check], memory_limit: int = DEFAULT_LIMIT
) -> Divergence | None:
    """The first sub-module that differs, traced in float64 on the CPU, independent of the device.

    Gradients are traced if all outputs agree, before the forward pass; a narrower dtype if only that one failed.
    """
    found = None
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        ours = comparison.jax_side("float64", side.state_dict())
        wide = [check for check in failed if check.precision == "float64" or not comparison.float64]
        of_gradients = ["gradients" in check.kind or "train" in check.kind for check in wide]
        agree = bool(wide) and all(of_gradients)
        if not agree:
            found = trace(side, ours, batch, memory_limit=memory_limit).divergence
        if found is None and any(of_gradients):
            found = trace(side, ours, batch, gradients=True, outputs_agree=agree, memory_limit=memory_limit).divergence
    narrow = [check.precision for check in failed if check.precision in ULPS and check.precision != "float64"]
    if found is None and narrow and not wide:
        sides = comparison.sides(narrow[0])
        rounded = Batch(sides.inputs, batch.labels, batch.targets)
        found = trace(sides.reference, sides.jax, rounded, memory_limit=memory_limit).divergence
    return found
