"""Verdicts on mutants and on unbroken cases as plain data, and a file of them from which a run continues.

{"mutant": KEY, "row": {…} or null}      a mutant; null: it changed no output and no gradient
{"case": NAME, "seeds": 20, "checks": [[seed, {…}], …]}      the readings of an unbroken case
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, TypeVar

from jaxmodels.io.bounded import open_in_place, read_text
from jaxmodels.process.failures import naming
from jaxmodels.process.texts import quoted, shortened, table_cell
from parity.mutation.mutate import Outcome
from parity.report.results import Check

LARGEST = 2**26  # bytes of a file; a verdict has some hundred
BEGUN = re.compile(r'\{"(mutant|case)": (?:"(?:[^"\\]|\\.)*(?:\\|"(.*))?)?')  # a line, whole or cut
FOLLOWING = {"mutant": ', "row": ', "case": ', "seeds": '}  # after the name

Alarms = dict[str, list[tuple[int, Check]]]


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

    def __init__(self, file: TextIO | None = None, path: Path | None = None):
        self.file, self.path = file, path
        self.rows: dict[str, Row | None] = {}
        self.alarms: dict[tuple[str, int], list[tuple[int, Check]]] = {}

    @classmethod
    @contextlib.contextmanager
    def opened(cls, file: Path | None) -> Iterator["State"]:
        """Context with the verdicts in a file, to which others are added; without a file, with none.

        A last verdict without an end, which a process that was killed left, is removed. Raises ValueError, naming file
        and line, if another line is not a verdict, and as `open_in_place`, as it is written.
        """
        if file is None:
            yield cls()
            return
        # What a full disk did not take is written again as the file is closed, and fails again.
        with naming(file), io.TextIOWrapper(io.BufferedRandom(open_in_place(file)), encoding="utf-8") as opened:
            *lines, rest = read_text(file, LARGEST).split("\n")
            opened.seek(0, os.SEEK_END)
            state = cls(opened, file)
            for number, line in enumerate([*lines, rest] if rest else lines, start=1):
                try:
                    state.take(json.loads(line))
                except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                    if number > len(lines) and isinstance(error, json.JSONDecodeError) and is_cut(line):
                        opened.truncate(opened.seek(os.stat(file).st_size - len(rest.encode())))
                        continue
                    reason = shortened(repr(error), 300)
                    raise ValueError(f"--state {file}, line {number} is not a verdict: {reason}") from None
                if number > len(lines):
                    state.write_text("\n")
            yield state

    def take(self, content: Any) -> None:
        """Read a line; raises ValueError, KeyError, TypeError or OverflowError if it is none that `write` writes."""
        if "mutant" in content:
            row = content["row"]
            self.rows[text(content["mutant"])] = None if row is None else checked(Row, row)
        else:
            seeds = whole(content["seeds"])
            checks = [(whole(seed), checked(Check, check)) for seed, check in content["checks"]]
            given = {(seed, check.precision) for seed, check in checks}
            if not 1 <= seeds <= len(checks) or given != {(s, p) for s in range(seeds) for p in ("float64", "float32")}:
                raise ValueError(f"its checks are not those of {seeds} seeds in float64 and float32")
            self.alarms[text(content["case"]), seeds] = checks

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
        self.write_text(f"{json.dumps(content)}\n")

    def write_text(self, content: str) -> None:
        if self.file is not None and self.path is not None:
            with naming(self.path):
                print(content, end="", file=self.file, flush=True)


def is_cut(line: str) -> bool:
    """True for the beginning of a line that `State.write` writes, cut behind its first key or later."""
    begun = BEGUN.fullmatch(line)
    if begun is None:
        return False
    rest, following = begun[2] or "", FOLLOWING[begun[1]]
    return rest.startswith(following) or following.startswith(rest)


def text(value: Any) -> str:
    """A name: it is printed, and holds no control characters."""
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{quoted(value)} must be a string of printable characters")
    return value


def whole(value: Any) -> int:
    """An integer."""
    if type(value) is not int:
        raise ValueError(f"{quoted(value)} must be an integer")
    return value


def number(value: Any) -> float:
    """A number, also NaN or an infinity."""
    if type(value) not in (int, float):
        raise ValueError(f"{quoted(value)} must be a number")
    return float(value)


def truth(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{quoted(value)} must be true or false")
    return value


Kind = TypeVar("Kind", Row, Check)
READERS: dict[Any, Callable[[Any], Any]] = {str: text, float: number, bool: truth}


def checked(kind: type[Kind], fields: Mapping[str, Any]) -> Kind:
    """A `Row` or `Check` of the fields of an object; raises ValueError or TypeError for one of another type."""
    values: dict[str, Any] = dict(fields)
    for name, expected in typing.get_type_hints(kind).items():
        if name in values and not (values[name] is None and isinstance(None, expected)):
            (reader,) = (READERS[one] for one in typing.get_args(expected) or (expected,) if one in READERS)
            values[name] = reader(values[name])
    return kind(**values)
