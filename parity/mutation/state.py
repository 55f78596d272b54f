"""Verdicts on mutants and on unbroken cases as plain data, and a file of them from which a run continues.

{"mutant": KEY, "row": {…} or null}      a mutant; null: it changed no output and no gradient
{"case": NAME, "seeds": 20, "checks": [[seed, {…}], …]}      the readings of an unbroken case
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from jaxmodels.io.bounded import read_text
from jaxmodels.io.manifest import refuse_link
from jaxmodels.process.failures import naming
from jaxmodels.process.texts import shortened, table_cell
from parity.mutation.mutate import Outcome
from parity.report.results import Check

LARGEST = 2**26  # bytes of a file; a verdict has some hundred

Alarms = dict[str, list[tuple[int, Check]]]


def without_links(path: str, flags: int) -> int:
    """Open a file, but not through a link that has taken its place since it was checked."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


@dataclasses.dataclass(frozen=True)
class Row:
    """A mutant's row in the table. value: the largest difference, in units of the noise. where: the named path."""

    case: str
    culprit: str
    operator: str
    kind: str
    value: float
    found: bool
    named: bool
    where: str | None
    hint: str

    @classmethod
    def of(cls, outcome: Outcome) -> "Row":
        """The row of an outcome."""
        by = max(outcome.failed, key=lambda check: check.value, default=None)
        where, mutant = outcome.divergence, outcome.mutant
        return cls(
            mutant.case,
            mutant.culprit,
            mutant.operator.name,
            by.kind if by else "",
            by.value if by else 0.0,
            outcome.found,
            outcome.named,
            where.path if where else None,
            where.hint if where else "",
        )

    def __str__(self) -> str:
        reading = f"{self.kind} {self.value:.0e}" if self.found else "**not found**"
        named = "yes" if self.named else "**nothing**" if self.where is None else f"**{self.where or 'the model'}**"
        culprit = f"`{self.culprit}`" if self.culprit else "the model"
        cells = (self.case, culprit, self.operator, reading, named, self.hint)
        return f"| {' | '.join(map(table_cell, cells))} |"


class State:
    """Verdicts so far. rows: by the mutant's key; alarms: by case and number of seeds."""

    def __init__(self, file: TextIO | None = None):
        self.file = file
        self.rows: dict[str, Row | None] = {}
        self.alarms: dict[tuple[str, int], list[tuple[int, Check]]] = {}

    @classmethod
    @contextlib.contextmanager
    def opened(cls, file: Path | None) -> Iterator["State"]:
        """Context with the verdicts in a file, to which others are added; without a file, with none.

        Raises ValueError, naming file and line, if a line is not a verdict, or if the file is a link: it is written.
        """
        if file is None:
            yield cls()
            return
        refuse_link(file)
        lines = read_text(file, LARGEST).splitlines() if file.exists() else []
        with open(file, "a", encoding="utf-8", opener=without_links) as opened:
            state = cls(opened)
            for number, line in enumerate(lines, start=1):
                try:
                    state.take(json.loads(line))
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    reason = shortened(repr(error), 300)
                    raise ValueError(f"--state {file}, line {number} is not a verdict: {reason}") from None
            yield state

    def take(self, content: dict[str, Any]) -> None:
        """Read a line."""
        if "mutant" in content:
            self.rows[content["mutant"]] = None if content["row"] is None else Row(**content["row"])
        else:
            checks = [(int(seed), Check(**check)) for seed, check in content["checks"]]
            self.alarms[content["case"], content["seeds"]] = checks

    def add(self, key: str, row: Row | None) -> None:
        """Add the verdict on a mutant."""
        self.rows[key] = row
        self.write({"mutant": key, "row": None if row is None else dataclasses.asdict(row)})

    def add_alarms(self, case: str, seeds: int, checks: list[tuple[int, Check]]) -> None:
        """Add the readings of an unbroken case."""
        self.alarms[case, seeds] = checks
        self.write({"case": case, "seeds": seeds, "checks": [[seed, dataclasses.asdict(c)] for seed, c in checks]})

    def write(self, content: dict[str, Any]) -> None:
        """Add a line to the file."""
        if self.file is not None:
            with naming(Path(self.file.name)):
                print(json.dumps(content), file=self.file, flush=True)
