"""Columns of the report: one list for the terminal table, the HTML page, JSON and JUnit XML.

A new column is a new `Column` in TABLES. A new unit, or another way to write a number, is a change of the `Unit`s.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol


class Measured(Protocol):
    """The fields of `parity.report.results.Check` that a column reads."""

    @property
    def kind(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def value(self) -> float: ...
    @property
    def limit(self) -> float: ...
    @property
    def passed(self) -> bool: ...


@dataclasses.dataclass(frozen=True)
class Template:
    """A `str.format` template for a positive number of two digits, or an integer below 10,000: 0.83, 120, 3e+11."""

    text: str

    def format(self, value: float) -> str:
        digits = ".2g" if value < 99.5 else ".0f" if value < 9999.5 else ".0e"
        return self.text.format(format(value, digits))


@dataclasses.dataclass(frozen=True)
class Unit:
    """Meaning and format of a number.

    short, full: `str.format` templates for a table cell and for a line of a listing; limits use `limit`. legend: the
    definition printed below a table.
    """

    short: Template | str
    full: Template | str
    limit: Template | str
    legend: str


NOISE = Unit(
    Template("{}×"), Template("{} × noise"), Template("{}"), "difference from float64 PyTorch / rounding noise"
)
COUNT = Unit("{:.0f}", "{:.2g}", "{:g}", "tensors changed by PyTorch → Flax → PyTorch")
SETTINGS = Unit("{:.0f}", "{:.0f} differ", "{:g}", "settings of training that differ")
UNITS = {  # by precision
    "float64": NOISE,
    "float32": NOISE,
    "bfloat16": NOISE,
    "float16": NOISE,
    "bits": COUNT,
    "settings": SETTINGS,
}


@dataclasses.dataclass(frozen=True)
class Column:
    """The checks of one kind and precision (None: any), a cell per report.

    heading: the column's title, below the precision. unit: how its values are written.
    """

    heading: str
    kind: str
    precision: str | None
    unit: Unit

    @property
    def title(self) -> str:
        """Precision and heading on one line: 'float64 output'."""
        return " ".join(dict.fromkeys(filter(None, (self.precision, self.heading))))

    def shows(self, check: Measured) -> bool:
        return check.kind == self.kind and self.precision in (None, check.precision)

    def find(self, checks: Iterable[Measured]) -> Measured | None:
        """The first of a report's checks that belongs in this column; None if there is none."""
        return next((check for check in checks if self.shows(check)), None)


READINGS = {  # heading: kind
    "output": "output",
    "∂params": "parameter gradients",
    "∂inputs": "input gradients",
    "decode": "cached decoding",
    "losses": "training loss",
    "trained": "trained parameters",
}
INVARIANCES = {
    "jit": "jit / no jit",
    "unrolled": "scanned / unrolled",
    "8 devices": "1 / 8 devices",
    "cached": "cached / full",
    "padded": "padded / unpadded",
    "accumulated": "accumulated / whole batch",
}
TABLES: dict[str, list[Column]] = {  # by the heading of the first column, which holds the reports' names
    "case": [
        *(Column(heading, kind, "float64", NOISE) for heading, kind in READINGS.items()),
        *(Column(heading, kind, "float32", NOISE) for heading, kind in READINGS.items()),
        Column("output", "output", "bfloat16", NOISE),
        Column("output", "output", "float16", NOISE),
        Column("bits", "round trip", "bits", COUNT),
    ],
    # Any precision: float64, or float32 on a device without float64.
    "must not change": [Column(heading, kind, None, NOISE) for heading, kind in INVARIANCES.items()],
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One report's value in one column."""

    column: Column
    value: float
    text: str
    passed: bool


def cell(column: Column, checks: Iterable[Measured]) -> Cell | None:
    """The cell of a report in a column; None if the report has no such check."""
    found = column.find(checks)
    if found is None:
        return None
    return Cell(column, found.value, column.unit.short.format(found.value), found.passed)


def cells(checks: Sequence[Measured]) -> list[Cell]:
    """All cells of one report, over all tables."""
    found = (cell(column, checks) for columns in TABLES.values() for column in columns)
    return [one for one in found if one is not None]


def tables(reports: Sequence[Sequence[Measured]]) -> Iterator[tuple[str, list[Column]]]:
    """Heading of each table and its columns that have a value in one of the reports (given by their checks)."""
    for heading, columns in TABLES.items():
        yield heading, [column for column in columns if any(column.find(checks) for checks in reports)]


def unit_of(check: Measured) -> Unit:
    """The unit of a check: its column's, or that of its precision."""
    columns = (column for columns in TABLES.values() for column in columns)
    return next((column.unit for column in columns if column.shows(check)), UNITS[check.precision])


def legend(reports: Sequence[Sequence[Measured]]) -> str:
    """Definition and limits of each unit in the reports' first table, on one line; '' if the table is empty."""
    groups: dict[Unit, tuple[dict[str, None], dict[str, None]]] = {}
    for column in next(iter(TABLES.values())):
        for check in filter(None, (column.find(checks) for checks in reports)):
            precisions, limits = groups.setdefault(column.unit, ({}, {}))
            precisions[check.precision] = None
            limits[column.unit.limit.format(check.limit)] = None
    return " ".join(
        f"{', '.join(precisions)}: {unit.legend}, at most {', '.join(limits)}."
        for unit, (precisions, limits) in groups.items()
    )
