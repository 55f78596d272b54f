"""Results of `check`, `sweep`, `trajectory`, `invariances` and `fast_path` as plain data; a `Report` combines them."""

import dataclasses
import math
from typing import Any

import numpy as np

from parity.locate.tree import Part, plain
from parity.report.columns import unit_of

TOP = 5  # k of `Agreement.top_k`
ROWS = 1024  # distributions compared at a time: one over 50,000 tokens takes 0.4 MB in float64


@dataclasses.dataclass(frozen=True)
class Check:
    """Comparison of all tensors of one kind: the largest value, the tensor that has it, and the limit.

    value: Flax's largest difference from PyTorch in float64, in units of the rounding noise of `precision`; with
    'bits', the number of tensors that changed. worst: the tensor's name. own: PyTorch's value of the same tensor in a
    narrower precision. An infinite limit means that the value is only reported.
    """

    kind: str
    precision: str
    worst: str
    value: float
    limit: float
    own: float | None = None

    @property
    def passed(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAILED"
        unit = unit_of(self)
        limit = f", at most {unit.limit.format(self.limit)}" if math.isfinite(self.limit) else ""
        own = "" if self.own is None else f" (PyTorch {unit.full.format(self.own)})"
        return (
            f"{verdict:6} {self.kind} ({self.precision}): {unit.full.format(self.value)}{own}{limit}, at {self.worst}"
        )


@dataclasses.dataclass(frozen=True)
class Reading(Check):
    """A check after one training step, counted from 0."""

    step: int = 0

    @property
    def where(self) -> str:
        """Kind and tensor: 'parameters of up.weight'."""
        return self.kind if self.worst == self.kind else f"{self.kind} of {self.worst}"


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Training of both sides, compared after every step.

    readings: in the order of computation. losses: of 'torch' and 'flax', by step. notes: why the unit of the readings
    is larger than the rounding noise.
    """

    optimizer: str
    precision: str
    readings: list[Reading]
    losses: dict[str, list[float]]
    seconds: float
    environment: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return all(reading.passed for reading in self.readings)

    @property
    def parted(self) -> Reading | None:
        """First reading that exceeds its limit; None if there is none."""
        return next((reading for reading in self.readings if not reading.passed), None)

    def by_kind(self) -> dict[str, list[Reading]]:
        """Readings of each kind, one per step."""
        kinds: dict[str, list[Reading]] = {}
        for reading in self.readings:
            kinds.setdefault(reading.kind, []).append(reading)
        return kinds

    def checks(self) -> list[Check]:
        """One `Check` per kind: its worst step. Float32 has no limit, see `trajectory`."""
        found = []
        for kind, readings in self.by_kind().items():
            worst = max(readings, key=lambda r: math.inf if math.isnan(r.value) else r.value)
            where = f"step {worst.step}" if worst.worst == kind else f"step {worst.step}, {worst.worst}"
            limit = worst.limit if self.precision == "float64" else math.inf
            found.append(Check(f"{self.optimizer}: {kind}", self.precision, where, worst.value, limit))
        return found

    def contents(self) -> dict[str, Any]:
        """Fields of a `Report` with this result only."""
        return {
            "seconds": self.seconds,
            "environment": self.environment,
            "checks": self.checks(),
            "trajectories": (self,),
            "notes": self.notes,
        }

    def to_json(self) -> dict[str, Any]:
        """Values that JSON can hold; infinities and NaN as strings."""
        fields = dataclasses.asdict(self)
        del fields["seconds"], fields["environment"]
        return plain(fields | {"passed": self.passed})

    def __str__(self) -> str:
        """Table of steps 0, 1, 2, 5, 10, … and the last, and the first step that differs."""
        kinds = self.by_kind()
        steps = len(next(iter(kinds.values())))
        shown = sorted({s for s in range(steps) if str(s).strip("0") in ("", "1", "2", "5")} | {steps - 1})
        headings = ("step", "loss (torch)", *kinds)
        widths = [4, *(max(7, len(heading)) for heading in headings[1:])]  # at most 80 columns with Adam
        rows = [
            (str(s), f"{self.losses['torch'][s]:.6g}", *(f"{found[s].value:.2g}" for found in kinds.values()))
            for s in shown
        ]
        lines = [f"{self.optimizer}, {self.precision}, {steps} steps, × noise"]
        lines += ["  ".join(map(str.rjust, row, widths)) for row in (headings, *rows)]
        at = self.parted
        lines += [f"  {note}" for note in self.notes]
        lines.append(
            "  no step differs"
            if at is None
            else f"  first difference at step {at.step}: {at.where}, {at.value:.2g} × noise, at most {at.limit:.2g}"
        )
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Agreement of next-token distributions with the reference's.

    kl_mean, kl_max: KL(reference ‖ model) over positions, in nats. top_1: share of positions with the same most likely
    token. top_k: mean share of the TOP most likely tokens that both have.
    """

    kl_mean: float
    kl_max: float
    top_1: float
    top_k: float

    @classmethod
    def of(cls, logits: np.ndarray, reference: np.ndarray) -> "Agreement":
        """Compare logits [..., V] over the whole vocabulary, ROWS positions at a time."""
        ours, theirs = (a.reshape(-1, a.shape[-1]) for a in (logits, reference))  # [N, V]
        k = min(TOP, reference.shape[-1])
        kl, same, shared = [], 0, 0
        for i in range(0, len(theirs), ROWS):
            p, q = (log_softmax(a[i : i + ROWS].astype(np.float64)) for a in (theirs, ours))
            kl.append((np.exp(p) * (p - q)).sum(axis=-1))
            same += int((p.argmax(axis=-1) == q.argmax(axis=-1)).sum())
            best = [np.argpartition(a, -k, axis=-1)[:, -k:] for a in (p, q)]
            shared += sum(len(np.intersect1d(a, b)) for a, b in zip(*best, strict=True))
        divergences = np.maximum(np.concatenate(kl), 0.0)  # rounding can leave -1e-17
        return cls(float(divergences.mean()), float(divergences.max()), same / len(theirs), shared / (k * len(theirs)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Row:
    """Results in one dtype.

    errors: by kind, the largest value of Flax and that of PyTorch, × noise. flax_agreement, torch_agreement: of a
    language model's distributions, with labels only. parts: errors of every sub-module, if layers were traced.
    """

    dtype: str
    errors: dict[str, tuple[float, float]]
    flax_agreement: Agreement | None
    torch_agreement: Agreement | None
    parts: Part | None


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A pair in several dtypes; `checks` limit Flax's error to a multiple of PyTorch's own.

    notes: why a value in float64 may be larger than the rounding noise.
    """

    rows: list[Row]
    checks: list[Check]
    seconds: float
    environment: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def contents(self) -> dict[str, Any]:
        """Fields of a `Report` with this result only."""
        return {
            "seconds": self.seconds,
            "environment": self.environment,
            "checks": self.checks,
            "sweep": self,
            "notes": self.notes,
        }

    def to_json(self) -> dict[str, Any]:
        """Values that JSON can hold; infinities and NaN as strings."""
        return plain({"rows": [dataclasses.asdict(row) for row in self.rows]})

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            for kind, (ours, theirs) in row.errors.items():
                lines.append(f"  {row.dtype:9} {kind:20} Flax {ours:.2g}, PyTorch {theirs:.2g} × noise")
            for side, agreement in (("Flax", row.flax_agreement), ("PyTorch", row.torch_agreement)):
                if agreement is not None:
                    lines.append(
                        f"  {row.dtype:9} {side:20} KL {agreement.kl_mean:.1e}, at most {agreement.kl_max:.1e}; "
                        f"best token {agreement.top_1:.2%}, best {TOP} {agreement.top_k:.2%}"
                    )
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Float32 values at the device's default matmul precision and at the highest, × noise.

    worst: the tensor with the largest value at the default precision. torch: PyTorch's value in float32.
    """

    kind: str
    worst: str
    strict: float
    default: float
    torch: float

    def __str__(self) -> str:
        return (
            f"{self.kind}: {self.default:.2g} × noise at the default precision, {self.strict:.2g} at the highest, "
            f"{self.torch:.2g} in PyTorch's float32; worst at {self.worst}"
        )


@dataclasses.dataclass(frozen=True)
class FastPath:
    """Errors at the device's default matmul precision, and differences between two runs compiled separately.

    Neither has a limit.
    """

    costs: list[Cost]
    checks: list[Check]
    seconds: float
    environment: dict[str, str]

    def contents(self) -> dict[str, Any]:
        """Fields of a `Report` with this result only."""
        return {
            "seconds": self.seconds,
            "environment": self.environment,
            "checks": self.checks,
            "costs": tuple(self.costs),
        }


@dataclasses.dataclass(frozen=True)
class Invariances:
    """One check per variant; `skipped` has the reason for each variant that the model does not have."""

    checks: list[Check]
    skipped: dict[str, str]
    seconds: float
    environment: dict[str, str]

    def contents(self) -> dict[str, Any]:
        """Fields of a `Report` with this result only."""
        return {
            "seconds": self.seconds,
            "environment": self.environment,
            "checks": self.checks,
            "skipped": self.skipped,
        }

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.checks), *(f"–      {kind}: {why}" for kind, why in self.skipped.items())])
