"""`Outcome`: the fields of a report that its text and its HTML page show."""

import dataclasses
import traceback
from collections.abc import Mapping, Sequence
from typing import Protocol

from parity.locate.tree import Divergence
from parity.report.results import Check, Cost, Sweep, Trajectory


@dataclasses.dataclass(frozen=True)
class Raised:
    """An exception that ended the comparison of a pair."""

    type: str
    message: str
    traceback: str

    @classmethod
    def of(cls, error: Exception) -> "Raised":
        return cls(type(error).__name__, str(error), "".join(traceback.format_exception(error)))

    def __str__(self) -> str:
        return f"{self.type}: {self.message}"


class Outcome(Protocol):
    """Implemented by `parity.report.report.Report`, which documents the fields."""

    @property
    def name(self) -> str: ...
    @property
    def checks(self) -> Sequence[Check]: ...
    @property
    def seconds(self) -> float: ...
    @property
    def environment(self) -> Mapping[str, str]: ...
    @property
    def divergence(self) -> Divergence | None: ...
    @property
    def sweep(self) -> Sweep | None: ...
    @property
    def trajectories(self) -> Sequence[Trajectory]: ...
    @property
    def costs(self) -> Sequence[Cost]: ...
    @property
    def skipped(self) -> Mapping[str, str]: ...
    @property
    def error(self) -> Raised | None: ...
    @property
    def notes(self) -> Sequence[str]: ...
    @property
    def passed(self) -> bool: ...
    @property
    def verdict(self) -> str: ...
