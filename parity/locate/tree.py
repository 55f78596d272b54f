"""The tree of a pair's sub-modules, each with its errors and a verdict.

A sub-module has two errors. *Propagated*: of its outputs in the run of the whole model, including the errors of
everything before it. *Isolated*: of its outputs given exactly the inputs of PyTorch's call. Both have their limit in
units of the rounding noise. A culprit exceeds it in the run and in isolation, and the sub-modules inside it do not
explain why: PyTorch's sub-module with those of Flax inside has other outputs than Flax's. A victim is within its limit
in isolation but received wrong inputs.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from parity.compare.noise import HUGE, Noise, wide

MATERIAL = 0.1  # of the largest share: a culprit that explains less is a lesser difference
DECADES = (-18, 2)  # the histogram's range: log10 of |Δ| over the largest magnitude


@dataclasses.dataclass(frozen=True)
class Errors:
    """Differences Δ of arrays from the reference; several arrays of one call count as one.

    error: max|Δ| / max|reference|; infinite if a value is not finite where the reference's is, or the reverse.
    noise: the largest |Δ| in units of the rounding noise, the number that has a limit; infinite without a noise.
    ulps: the largest |Δ| in units of the spacing of the reference's values in `dtype`.
    snr_db: 10·log10(Σ reference² / Σ Δ²), infinite for equal arrays.
    histogram: elements by the decade of |Δ| / max|reference|, from below 1e-18 to above 1e2, without equal elements.
    """

    error: float
    max_absolute: float
    p99_absolute: float
    mean_absolute: float
    max_relative: float
    p99_relative: float
    mean_relative: float
    ulps: float
    snr_db: float
    size: int
    histogram: tuple[int, ...]
    noise: float = math.inf

    @classmethod
    def of(
        cls,
        result: Sequence[np.ndarray],
        reference: Sequence[np.ndarray],
        dtype: Any = np.float64,
        scale: float = 0.0,
        noises: Sequence[Noise] = (),
    ) -> "Errors | None":
        """Errors of pairs of arrays; None if the shapes of a pair do not broadcast.

        The error is relative to the largest magnitude of each array, or to `scale` if that is given. Mask constants,
        NaN and infinities at the same places on both sides have no difference.
        """
        try:
            pairs = [np.broadcast_arrays(a, b) for a, b in zip(result, reference, strict=False)]
        except ValueError:
            return None
        if not any(a.size for a, _ in pairs):
            return None
        times = max((n.error(a, b) for (a, b), n in zip(pairs, noises, strict=False)), default=math.inf)
        limits = [n.masks_from for n in noises][: len(pairs)] or [HUGE] * len(pairs)
        kept = [compared(a, b, limit) for (a, b), limit in zip(pairs, limits, strict=True)]
        if any(pair is None for pair in kept):
            return NOT_FINITE
        numbers = [pair for pair in kept if pair is not None]
        a, b = (np.concatenate([pair[i] for pair in numbers]) for i in (0, 1))
        if not a.size:
            return dataclasses.replace(NONE, noise=times)
        apart, size = np.abs(a - b), np.abs(b)
        relative = apart[size > 0] / size[size > 0]
        relative = relative if relative.size else np.zeros(1)
        scales = [scale or float(np.abs(pair[1]).max(initial=0.0)) or 1.0 for pair in numbers]
        scaled = apart / np.repeat(scales, [pair[1].size for pair in numbers])
        unequal = scaled[scaled > 0]
        low, high = DECADES
        counts, _ = np.histogram(np.clip(np.log10(unequal), low, high - 1e-9), bins=high - low, range=DECADES)
        noise, signal = float(np.square(apart).sum()), float(np.square(b).sum())
        with np.errstate(divide="ignore"):
            snr = 10 * float(np.log10(signal) - np.log10(noise)) if noise else math.inf
        return cls(
            error=float(scaled.max()),
            max_absolute=float(apart.max()),
            p99_absolute=float(np.percentile(apart, 99)),
            mean_absolute=float(apart.mean()),
            max_relative=float(relative.max()),
            p99_relative=float(np.percentile(relative, 99)),
            mean_relative=float(relative.mean()),
            ulps=float((apart / np.maximum(spacing(size, dtype), np.finfo(np.float64).tiny)).max()),
            snr_db=snr,
            size=a.size,
            histogram=tuple(map(int, counts)),
            noise=times,
        )

    def __str__(self) -> str:
        return (
            f"{self.error:.1e} of the scale; |Δ| {self.max_absolute:.1e} p99 {self.p99_absolute:.1e} "
            f"mean {self.mean_absolute:.1e}; relative {self.max_relative:.1e} p99 {self.p99_relative:.1e} "
            f"mean {self.mean_relative:.1e}; {self.ulps:.2g} ulp; {self.snr_db:.0f} dB"
        )


NOT_FINITE = Errors(*(math.inf,) * 8, snr_db=-math.inf, size=0, histogram=(0,) * (DECADES[1] - DECADES[0]))
NONE = Errors(*(0.0,) * 8, snr_db=math.inf, size=0, histogram=(0,) * (DECADES[1] - DECADES[0]))


def compared(a: np.ndarray, b: np.ndarray, masks_from: float) -> tuple[np.ndarray, np.ndarray] | None:
    """The elements that are numbers on both sides, real and imaginary parts apart; None if they are at other places."""
    dtype = np.result_type(wide(a), wide(b))
    a, b = (real(x.astype(dtype)) for x in (a, b))
    with np.errstate(invalid="ignore"):
        number = np.abs(b) < masks_from  # False for NaN
        large = (np.sign(a) == np.sign(b)) & (np.abs(a) >= min(masks_from, HUGE))
        same = np.where(number, np.isfinite(a), (np.isnan(a) & np.isnan(b)) | large)
    return (a[number], b[number]) if same.all() else None


def real(array: np.ndarray) -> np.ndarray:
    """The array, flat, with the parts of complex numbers one after the other."""
    return np.ascontiguousarray(array).ravel().view(np.float64)


def spacing(magnitude: np.ndarray, dtype: Any) -> np.ndarray:
    """The distance to the next value of a floating dtype, at each magnitude."""
    import ml_dtypes

    info = ml_dtypes.finfo(dtype)
    exponent = np.floor(np.log2(np.maximum(magnitude, float(info.smallest_normal))))
    return float(info.eps) * np.exp2(exponent)


@dataclasses.dataclass(frozen=True)
class Part:
    """One sub-module in one direction, and the sub-modules inside it.

    path: PyTorch's path ('' is the whole model)
    flax_path, flax_type: of the counterpart; '' if none was called
    stage: 'forward' or 'backward'
    order: of its first call beyond the limit, else of its first call, among all calls of its direction
    propagated, isolated: errors of the worst of its `calls`, None if nothing could be compared. Forward: of outputs.
        Backward: of the gradient that arrives at the output (propagated), and of the gradients of its inputs and own
        parameters (isolated)
    limit: the largest allowed `noise` of the errors
    verdict: 'agrees', 'culprit', 'encloses' (a culprit), 'victim', 'unmatched' (Flax has no such call) or
        'not compared'
    share: of the model's error that a culprit explains; None for all others
    reason: why the part, or its repetition in isolation, was not compared
    """

    path: str
    flax_path: str
    torch_type: str
    flax_type: str
    stage: str
    order: int
    calls: int
    propagated: Errors | None
    isolated: Errors | None
    limit: float
    verdict: str
    hint: str = ""
    children: tuple["Part", ...] = ()
    share: float | None = None
    reason: str = ""

    @property
    def worst(self) -> float:
        """The larger of both errors."""
        return max((e.error for e in (self.isolated, self.propagated) if e is not None), default=0.0)

    def walk(self) -> Iterator["Part"]:
        """This part and every part inside it, outermost first."""
        yield self
        for child in self.children:
            yield from child.walk()

    def culprits(self) -> list["Part"]:
        """The culprits: those that explain the model's error in the order in which they ran, then lesser ones."""
        found = sorted((part for part in self.walk() if part.verdict == "culprit"), key=lambda part: part.order)
        most = max((part.share or 0.0 for part in found), default=0.0)
        return sorted(found, key=lambda part: (part.share or 0.0) < MATERIAL * most)

    def to_json(self) -> dict[str, Any]:
        """Values that JSON can hold; infinities are strings."""
        return plain(dataclasses.asdict(self))

    def __str__(self) -> str:
        return "\n".join(lines_of(self, 0))


def lines_of(part: Part, depth: int, above: str = "") -> Iterator[str]:
    """The tree as text, worst part first; parts that agree are only counted."""
    name = part.path.removeprefix(above).removeprefix(".") or "the model"
    isolated = f", alone {part.isolated.error:.1e}" if part.isolated else ""
    error = f"{part.propagated.error:.1e}{isolated}" if part.propagated else isolated.removeprefix(", ")
    share = f", {part.share:.0%} of the model's error" if part.share is not None else ""
    notes = "; ".join(filter(None, (part.hint, part.reason)))
    yield f"{'  ' * depth}{name}  {part.verdict}  {error}{share}{f'  ({notes})' if notes else ''}".rstrip()
    if part.verdict == "culprit" and part.isolated:
        yield f"{'  ' * depth}    {part.isolated}"
    agree = [child for child in part.children if all(p.verdict in ("agrees", "unmatched") for p in child.walk())]
    for child in sorted((c for c in part.children if c not in agree), key=by_blame):
        yield from lines_of(child, depth + 1, part.path)
    if agree:
        yield f"{'  ' * (depth + 1)}{len(agree)} more {'part agrees' if len(agree) == 1 else 'parts agree'}"


def by_blame(part: Part) -> tuple[float, float]:
    """A key that sorts the worst part first: by its isolated error, then by its propagated one."""
    isolated, propagated = (-e.error if e else 0.0 for e in (part.isolated, part.propagated))
    return isolated, propagated


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The first culprit (path '' is the whole model), and the trees in which it was found.

    error: of its outputs in isolation, or of its gradients if stage is 'backward'. fast_path: the plain form agrees
    with PyTorch, but the model's own call differs from it.
    """

    path: str
    flax_type: str
    error: float
    fast_path: bool = False
    stage: str = "forward"
    hint: str = ""
    dtype: str = "float64"
    forward: Part | None = None
    backward: Part | None = None

    def __str__(self) -> str:
        what = "outputs" if self.stage == "forward" else "gradients"
        if self.stage == "training":
            return f"first divergence: {self.path or 'the model'}, in training mode only: {self.hint}"
        if self.fast_path:
            return f"{self.flax_type}: its plain form agrees, but {what} of its call differ from it by {self.error:.1e}"
        where = self.path or "the model itself, outside its sub-modules"
        hint = f": {self.hint}" if self.hint else ""
        return f"first divergence: {where} ({self.flax_type}), same inputs, {what} differ by {self.error:.1e}{hint}"

    def tree(self) -> str:
        """The parts that differ, worst first, in the culprit's direction."""
        part = self.backward if self.stage == "backward" else self.forward
        return "" if part is None else str(part)

    def to_json(self) -> dict[str, Any]:
        """Values that JSON can hold; infinities are strings."""
        return plain(dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Trace:
    """The trees of both directions in one dtype, and the first divergence in them; backward is None if not traced."""

    dtype: str
    forward: Part
    backward: Part | None
    divergence: Divergence | None

    def to_json(self) -> dict[str, Any]:
        """Values that JSON can hold; infinities are strings."""
        return plain(dataclasses.asdict(self))

    def __str__(self) -> str:
        first = str(self.divergence) if self.divergence else "no divergence"
        trees = [f"forward, {self.dtype}\n{self.forward}"]
        trees += [f"backward, {self.dtype}\n{self.backward}"] if self.backward else []
        return "\n".join([first, *trees])


def plain(value: Any) -> Any:
    """A value as JSON can hold it: infinities and NaN as strings, tuples as lists."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
