"""`Report`: checks of a pair with their limits, the first sub-module that diverges, and the stamp of the run."""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any, Protocol

from jaxmodels.process.texts import visible
from parity.locate.tree import Divergence, plain
from parity.report.columns import cells
from parity.report.outcome import Raised
from parity.report.page.html import fragment
from parity.report.results import Check, Cost, Sweep, Trajectory
from parity.report.stamp import joined, software
from parity.report.text import text


class Result(Protocol):
    """Return type of `check`, `replay`, `sweep`, `trajectory` and `invariances`."""

    def contents(self) -> dict[str, Any]:
        """Fields of a `Report` with this result only, without its name."""


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """Outcome of one `check`, or of several functions on one pair (`Report.of`).

    divergence: the first sub-module that differs. skipped: checks that do not apply to the pair, with the reason.
    error: the exception that prevented further checks. notes: what a reader of the numbers must know, a sentence each:
    what was widened, what was not compared, what is float32 inside.
    """

    name: str
    checks: list[Check]
    seconds: float
    environment: dict[str, str]
    divergence: Divergence | None = None
    sweep: Sweep | None = None
    trajectories: tuple[Trajectory, ...] = ()
    costs: tuple[Cost, ...] = ()
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    error: Raised | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, *results: Result, error: Exception | None = None) -> "Report":
        """Combine results of `check`, `replay`, `sweep`, `trajectory` and `invariances` for one pair.

        error: an exception that one of them raised; results may then be empty. Raises ValueError for an object of
        another type, and if two results contain the same check.
        """
        wrong = sorted({type(result).__name__ for result in results if not hasattr(result, "contents")})
        if wrong or not (results or error):
            got = ", ".join(wrong) or "none"
            raise ValueError(
                f"results: got {got}; pass what parity.check, replay, sweep, trajectory or invariances return"
            )
        parts = [cls(name, **result.contents()) for result in results]
        # A single result may repeat a check, as `check(half=[d, d])` does; two results may not.
        counts = Counter(key for part in parts for key in dict.fromkeys((c.kind, c.precision) for c in part.checks))
        twice = [f"{kind} ({precision})" for (kind, precision), n in counts.items() if n > 1]
        sweeps = [part.sweep for part in parts if part.sweep is not None]
        if twice or len(sweeps) > 1:
            raise ValueError(f"results: {', '.join(twice) or 'sweep'} given twice; a report takes each check once")
        return cls(
            name,
            [check for part in parts for check in part.checks],
            sum(part.seconds for part in parts),
            joined([part.environment for part in parts] or [software()]),
            next((part.divergence for part in parts if part.divergence), None),
            sweep=sweeps[0] if sweeps else None,
            trajectories=tuple(run for part in parts for run in part.trajectories),
            costs=tuple(cost for part in parts for cost in part.costs),
            skipped={kind: why for part in parts for kind, why in part.skipped.items()},
            error=Raised.of(error) if error else next((part.error for part in parts if part.error), None),
            notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
        )

    @classmethod
    def gathered(cls, name: str, results: Iterable[Result]) -> "Report":
        """Combine results of an iterator; an exception it raises is recorded with the results before it."""
        done: list[Result] = []
        try:
            for result in results:
                done.append(result)
        except Exception as error:
            return cls.of(name, *done, error=error)
        return cls.of(name, *done)

    def contents(self) -> dict[str, Any]:
        """All fields except the name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "name"}

    @property
    def passed(self) -> bool:
        return self.error is None and all(check.passed for check in self.checks)

    @property
    def verdict(self) -> str:
        return "ERROR" if self.error else "agrees" if self.passed else "DIFFERS"

    def check(self, kind: str) -> Check | None:
        """First check of a kind; None if there is none."""
        return next((c for c in self.checks if c.kind == kind), None)

    def value(self, kind: str, precision: str) -> float | None:
        """Value of a check; None if there is no such check."""
        return next((c.value for c in self.checks if (c.kind, c.precision) == (kind, precision)), None)

    def __repr__(self) -> str:
        """One line, as pytest shows it below `assert report.passed`."""
        failed = sum(not check.passed for check in self.checks)
        found = f"; {self.divergence}" if self.divergence else ""
        return visible(f"<Report {self.name}: {self.verdict}, {failed} of {len(self.checks)} readings failed{found}>")

    def __str__(self) -> str:
        """Plain text, at most 100 columns: the verdict, what differs first, failed and passed readings, notes."""
        return text(self)

    def _repr_html_(self) -> str:
        """The report in a notebook: the body of its HTML page."""
        return fragment(self)

    def raise_if_failed(self) -> None:
        """Raise `Differs`, an AssertionError with the report, if a reading fails or an exception was recorded."""
        __tracebackhide__ = True  # pytest shows the line of the test instead
        if not self.passed:
            raise Differs(self)

    def to_dict(self) -> dict[str, Any]:
        """The report as written to JSON; infinities and NaN as strings."""
        checks = [plain(dataclasses.asdict(check)) | {"passed": check.passed} for check in self.checks]
        where = self.divergence
        return {
            "name": self.name,
            "passed": self.passed,
            "seconds": round(self.seconds, 3),
            "columns": [
                plain({"title": cell.column.title, "value": cell.value, "text": cell.text, "passed": cell.passed})
                for cell in cells(self.checks)
            ],
            "checks": checks,
            "divergence": where.to_json() if where else None,
            "environment": self.environment,
            "sweep": self.sweep.to_json() if self.sweep else None,
            "trajectories": [trajectory.to_json() for trajectory in self.trajectories],
            "costs": [plain(dataclasses.asdict(cost)) for cost in self.costs],
            "skipped": self.skipped,
            "notes": list(self.notes),
            "error": dataclasses.asdict(self.error) if self.error else None,
        }


class Differs(AssertionError):
    """A pair does not agree. `report` is its report, which is also the message."""

    def __init__(self, report: Report):
        super().__init__(str(report))
        self.report = report

    def __reduce__(self) -> tuple[type["Differs"], tuple[Report]]:
        return type(self), (self.report,)
