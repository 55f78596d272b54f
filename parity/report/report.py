"""What was found of a pair: readings with their limits, the first sub-module that diverges, the stamp of the run."""

import dataclasses
import importlib.metadata
import math
import platform
import subprocess
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax

from parity.locate.tree import Divergence, plain

if TYPE_CHECKING:  # these need torch, a report does not
    from parity.measure.dtypes import Cost, Sweep
    from parity.measure.trajectory import Trajectory


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
class Raised:
    """An exception that ended the readings of a pair."""

    type: str
    message: str
    traceback: str

    @classmethod
    def of(cls, error: Exception) -> "Raised":
        return cls(type(error).__name__, str(error), "".join(traceback.format_exception(error)))

    def __str__(self) -> str:
        return f"{self.type}: {self.message}"


class Result(Protocol):
    """What `check`, `replay`, `sweep`, `trajectory` and `invariances` return."""

    def report(self, name: str) -> "Report":
        """A report that holds this alone."""


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of one `check`, or of all that was read of a pair (`Report.of`).

    skipped: what was asked for and does not exist for it, and why. error: what kept the rest from being read.
    """

    name: str
    checks: list[Check]
    divergence: Divergence | None
    seconds: float
    environment: dict[str, str]
    sweep: "Sweep | None" = None
    trajectories: tuple["Trajectory", ...] = ()
    costs: tuple["Cost", ...] = ()
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    error: Raised | None = None

    @classmethod
    def of(cls, name: str, *results: Result, error: Exception | None = None) -> "Report":
        """One report of what `check`, `replay`, `sweep`, `trajectory` and `invariances` returned of one pair.

        error: what one of them raised; then there may be no results. Raises ValueError for a result of something else,
        and where two of them hold the same reading.
        """
        wrong = sorted({type(result).__name__ for result in results if not hasattr(result, "report")})
        if wrong or not (results or error):
            raise ValueError(f"results must be what parity's functions return, got {', '.join(wrong) or 'none'}")
        parts = [result.report(name) for result in results]
        found = Counter(
            reading for part in parts for reading in dict.fromkeys((c.kind, c.precision) for c in part.checks)
        )
        twice = [f"{kind} ({precision})" for (kind, precision), n in found.items() if n > 1]
        sweeps = [part.sweep for part in parts if part.sweep is not None]
        if twice or len(sweeps) > 1:
            raise ValueError(f"results hold twice: {', '.join(twice) or 'sweep'}; make a report of each")
        return cls(
            name,
            [check for part in parts for check in part.checks],
            next((part.divergence for part in parts if part.divergence), None),
            sum(part.seconds for part in parts),
            joined([part.environment for part in parts] or [software()]),
            sweep=sweeps[0] if sweeps else None,
            trajectories=tuple(run for part in parts for run in part.trajectories),
            costs=tuple(cost for part in parts for cost in part.costs),
            skipped={kind: why for part in parts for kind, why in part.skipped.items()},
            error=Raised.of(error) if error else next((part.error for part in parts if part.error), None),
        )

    @classmethod
    def gathered(cls, name: str, results: Iterable[Result]) -> "Report":
        """`of` results as they are made: what raises ends them, and is in the report beside those that came before."""
        found: list[Result] = []
        try:
            for result in results:
                found.append(result)
        except Exception as error:
            return cls.of(name, *found, error=error)
        return cls.of(name, *found)

    def report(self, name: str) -> "Report":
        """The same by another name."""
        return dataclasses.replace(self, name=name)

    @property
    def passed(self) -> bool:
        return self.error is None and all(check.passed for check in self.checks)

    @property
    def verdict(self) -> str:
        return "ERROR" if self.error else "agrees" if self.passed else "DIFFERS"

    def check(self, kind: str) -> Check | None:
        """The first reading of a kind, None where it was not taken."""
        return next((c for c in self.checks if c.kind == kind), None)

    def value(self, kind: str, precision: str) -> float | None:
        """One reading's value, None where it was not taken."""
        return next((c.value for c in self.checks if (c.kind, c.precision) == (kind, precision)), None)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.verdict}"]
        lines += [f"  {check}" for check in self.checks]
        if self.divergence:
            lines.append(f"  {self.divergence}")
        lines += [f"  –      {kind}: {why}" for kind, why in self.skipped.items()]
        lines += [f"  {cost}" for cost in self.costs]
        lines += [f"  {self.error}"] if self.error else []
        lines += [str(part) for part in (self.sweep, *self.trajectories) if part is not None]
        return "\n".join(lines)

    def raise_if_failed(self) -> None:
        """Raises AssertionError with the whole report where any reading is past its limit."""
        if not self.passed:
            raise AssertionError(str(self))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON has it; infinities as strings."""
        checks = [plain(dataclasses.asdict(check)) | {"passed": check.passed} for check in self.checks]
        where = self.divergence
        return {
            "name": self.name,
            "passed": self.passed,
            "seconds": round(self.seconds, 3),
            "checks": checks,
            "divergence": where.to_json() if where else None,
            "environment": self.environment,
            "sweep": self.sweep.to_json() if self.sweep else None,
            "trajectories": [trajectory.to_json() for trajectory in self.trajectories],
            "costs": [plain(dataclasses.asdict(cost)) for cost in self.costs],
            "skipped": self.skipped,
            "error": dataclasses.asdict(self.error) if self.error else None,
        }


def joined(stamps: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """One stamp of several: where they differ, all that they say."""
    values: dict[str, dict[str, None]] = {}
    for stamp in stamps:
        for key, value in stamp.items():
            values.setdefault(key, {})[value] = None
    return {key: "; ".join(said) for key, said in values.items()}


def environment(device: jax.Device, float64: bool, seed: int | None) -> dict[str, str]:
    """Where and how a check ran: versions, device, precision flags, seed, and the git commit it ran in."""
    return software() | {
        "device": f"{device.platform}: {device.device_kind}",
        "matmul precision": "highest, TF32 off",
        "float64": "on the device" if float64 else "PyTorch on the CPU alone",
        "seed": "recorded" if seed is None else str(seed),
        "git commit": commit(),
    }


def software() -> dict[str, str]:
    """The versions, which can be told wherever nothing runs."""
    packages = ["jax", "jaxlib", "flax", "optax", "numpy", "torch"]
    return {
        **{package: version(package) for package in packages},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """The commit of the working directory, with a + where files differ from it; 'none' outside a repository."""
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            cwd=Path.cwd(),
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return said.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "none"
