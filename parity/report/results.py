"""Results of `check`, `sweep`, `trajectory`, `invariances` and `fast_path` as plain data; a `Report` gathers them."""

import dataclasses
import math
from typing import Any

import numpy as np

from parity.locate.tree import Part, plain

TOP = 5
ROWS = 1024  # distributions at once: 50,000 tokens in float64 are 0.4 MB each


@dataclasses.dataclass(frozen=True)
class Check:
    """One reading: the worst value among its tensors, that tensor's name, and the most it may be.

    precision 'float64': an error relative to the largest tensor of the kind; 'float32', 'bfloat16', 'float16': Flax's
    error against the truth in units of PyTorch's own; 'bits': tensors that changed. An infinite limit only reports.
    """

    kind: str
    precision: str
    worst: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAILED"
        limit = f", at most {self.limit:g}" if math.isfinite(self.limit) else ""
        return f"{verdict:6} {self.kind} ({self.precision}): {self.value:.2g}{limit}, at {self.worst}"


@dataclasses.dataclass(frozen=True)
class Reading(Check):
    """The worst tensor of one kind after one step (counted from 0), and how far off it is."""

    step: int = 0

    @property
    def where(self) -> str:
        return self.kind if self.worst == self.kind else f"{self.kind} of {self.worst}"


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Every reading of a run, in the order in which they were computed; `losses` of both sides by step."""

    optimizer: str
    precision: str
    readings: list[Reading]
    losses: dict[str, list[float]]
    seconds: float
    environment: dict[str, str]

    @property
    def passed(self) -> bool:
        return all(reading.passed for reading in self.readings)

    @property
    def parted(self) -> Reading | None:
        """The first reading past its limit: where both sides part."""
        return next((reading for reading in self.readings if not reading.passed), None)

    def by_kind(self) -> dict[str, list[Reading]]:
        """The readings of each kind, one per step."""
        kinds: dict[str, list[Reading]] = {}
        for reading in self.readings:
            kinds.setdefault(reading.kind, []).append(reading)
        return kinds

    def checks(self) -> list[Check]:
        """One `Check` per kind: its worst step. In float32 they only report, see `trajectory`."""
        found = []
        for kind, readings in self.by_kind().items():
            worst = max(readings, key=lambda r: math.inf if math.isnan(r.value) else r.value)
            where = f"step {worst.step}" if worst.worst == kind else f"step {worst.step}, {worst.worst}"
            limit = worst.limit if self.precision == "float64" else math.inf
            found.append(Check(f"{self.optimizer}: {kind}", self.precision, where, worst.value, limit))
        return found

    def contents(self) -> dict[str, Any]:
        """Fields of a `Report` that holds this result alone."""
        return {
            "seconds": self.seconds,
            "environment": self.environment,
            "checks": self.checks(),
            "trajectories": (self,),
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values; infinities are strings."""
        said = {key: value for key, value in dataclasses.asdict(self).items() if key not in ("seconds", "environment")}
        return plain(said | {"passed": self.passed})

    def __str__(self) -> str:
        """A table of steps 0, 1, 2, 5, 10, … and the last, and where the sides part."""
        kinds = self.by_kind()
        steps = len(next(iter(kinds.values())))
        shown = sorted({s for s in range(steps) if str(s).strip("0") in ("", "1", "2", "5")} | {steps - 1})
        width = max(12, *map(len, kinds))
        lines = [f"{self.optimizer}, {self.precision}, {steps} steps"]
        lines.append("  step  " + "  ".join(f"{h:>{width}}" for h in ("loss (torch)", *kinds)))
        for s in shown:
            cells = [f"{self.losses['torch'][s]:.6g}", *(f"{readings[s].value:.1e}" for readings in kinds.values())]
            lines.append(f"  {s:>4}  " + "  ".join(f"{cell:>{width}}" for cell in cells))
        at = self.parted
        lines.append(
            "  the sides never part"
            if at is None
            else f"  first part at step {at.step}: {at.where}, {at.value:.1e}, at most {at.limit:g}"
        )
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How near distributions are to the true ones: KL(truth ‖ model) in nats, and the share of positions whose best
    token, of tokens among the TOP best, that are the same."""

    kl_mean: float
    kl_max: float
    top_1: float
    top_k: float

    @classmethod
    def of(cls, logits: np.ndarray, truth: np.ndarray) -> "Agreement":
        """Over the last axis, whole; a part of the positions at a time."""
        ours, theirs = (a.reshape(-1, a.shape[-1]) for a in (logits, truth))
        k = min(TOP, truth.shape[-1])
        kl, same, shared = [], 0, 0
        for i in range(0, len(theirs), ROWS):
            p, q = (log_softmax(a[i : i + ROWS].astype(np.float64)) for a in (theirs, ours))
            kl.append((np.exp(p) * (p - q)).sum(axis=-1))
            same += int((p.argmax(axis=-1) == q.argmax(axis=-1)).sum())
            best = [np.argpartition(a, -k, axis=-1)[:, -k:] for a in (p, q)]
            shared += sum(len(np.intersect1d(a, b)) for a, b in zip(*best, strict=True))
        found = np.maximum(np.concatenate(kl), 0.0)  # rounding can leave -1e-17
        return cls(float(found.mean()), float(found.max()), same / len(theirs), shared / (k * len(theirs)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Row:
    """One dtype: the worst errors of Flax and of PyTorch by kind, agreements of a language model, the traced parts."""

    dtype: str
    errors: dict[str, tuple[float, float]]  # Flax's, PyTorch's
    flax_agreement: Agreement | None
    torch_agreement: Agreement | None
    parts: Part | None


@dataclasses.dataclass(frozen=True)
class Sweep:
    """All dtypes of one pair; `checks` holds Flax to PyTorch's own error."""

    rows: list[Row]
    checks: list[Check]
    seconds: float
    environment: dict[str, str]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def contents(self) -> dict[str, Any]:
        """Fields of a `Report` that holds this result alone."""
        return {"seconds": self.seconds, "environment": self.environment, "checks": self.checks, "sweep": self}

    def to_json(self) -> dict[str, Any]:
        """Plain values; infinities are strings."""
        return plain({"rows": [dataclasses.asdict(row) for row in self.rows]})

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            for kind, (ours, theirs) in row.errors.items():
                lines.append(f"  {row.dtype:9} {kind:20} Flax {ours:.1e}, PyTorch {theirs:.1e}")
            for side, agreement in (("Flax", row.flax_agreement), ("PyTorch", row.torch_agreement)):
                if agreement is not None:
                    lines.append(
                        f"  {row.dtype:9} {side:20} KL {agreement.kl_mean:.1e}, at most {agreement.kl_max:.1e}; "
                        f"best token {agreement.top_1:.2%}, best {TOP} {agreement.top_k:.2%}"
                    )
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the device's default precision costs in float32: errors against the truth, of the worst tensor."""

    kind: str
    worst: str
    strict: float
    default: float
    torch: float

    def __str__(self) -> str:
        return (
            f"{self.kind}: {self.default:.1e} at the default precision, {self.strict:.1e} at the highest, "
            f"{self.torch:.1e} in PyTorch's float32; worst at {self.worst}"
        )


@dataclasses.dataclass(frozen=True)
class FastPath:
    """What the default precision costs, which has no limit, and how far apart two runs of two compilations are."""

    costs: list[Cost]
    checks: list[Check]
    seconds: float
    environment: dict[str, str]

    def contents(self) -> dict[str, Any]:
        """Fields of a `Report` that holds this result alone."""
        return {
            "seconds": self.seconds,
            "environment": self.environment,
            "checks": self.checks,
            "costs": tuple(self.costs),
        }


@dataclasses.dataclass(frozen=True)
class Invariances:
    """A check per variant, and why the others were not read."""

    checks: list[Check]
    skipped: dict[str, str]
    seconds: float
    environment: dict[str, str]

    def contents(self) -> dict[str, Any]:
        """Fields of a `Report` that holds this result alone."""
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
