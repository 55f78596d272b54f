"""Reports in the terminal: the tables, at most as wide as the terminal, their legend and the stamp."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from jaxmodels.process.texts import visible
from parity.report.columns import Cell, Column, cell, legend, tables
from parity.report.report import Report
from parity.report.stamp import joined
from parity.report.text import WIDTH as TEXT_WIDTH
from parity.report.text import folded, text

WIDTH = 184  # of a table in a file, which cannot be widened afterwards; rich would wrap it at 80
FOLDED = "Columns named 'worst' stand for several readings; a wider terminal shows each."
Group = tuple[str, list[Column]]  # heading, and the columns whose worst value is shown


def make_console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def print_failure(report: Report, console: Console) -> None:
    """Print a report in full if it failed, its verdict and what differs in red."""
    if report.passed:
        return
    for i, line in enumerate(text(report, min(TEXT_WIDTH, console.width)).splitlines()):
        style = "red" if i == 0 or line.startswith("  FAILED") else ""
        console.print(Text(line, style), soft_wrap=True)


def summary(reports: Sequence[Report], console: Console) -> None:
    """Print the tables, the legend, the stamp, and everything else that was measured."""
    first, *others = tables([report.checks for report in reports])
    folded = print_table(reports, *first, console, verdicts=True)
    passed = sum(report.passed for report in reports)
    prose(f"{passed} of {len(reports)} cases agree. {legend([report.checks for report in reports])}", console)
    if folded:
        prose(FOLDED, console)
    stamp = joined(report.environment for report in reports)
    prose(", ".join(f"{key} {value}" for key, value in stamp.items()), console, style="dim")
    for heading, columns in others:
        if columns:
            print_table(reports, heading, columns, console, verdicts=False)
    details(reports, console)


def prose(line: str, console: Console, style: str = "") -> None:
    """Print a paragraph; in a file it stays one line."""
    console.print(Text(visible(line).rstrip(), style), soft_wrap=not console.is_terminal)


def print_table(
    reports: Sequence[Report], heading: str, columns: Sequence[Column], console: Console, *, verdicts: bool
) -> bool:
    """Print a row per report; returns True if columns had to be folded to fit the console."""
    choices = [table_of(reports, heading, groups, verdicts=verdicts) for groups in foldings(columns)]
    unlimited = console.options.update(max_width=10_000)
    fits = (table for table in choices if Measurement.get(console, unlimited, table).maximum <= console.width)
    table = next(fits, choices[-1])
    console.print(table)
    return table is not choices[0]


def foldings(columns: Sequence[Column]) -> Iterator[list[Group]]:
    """The table's columns in fewer and fewer groups: each its own; narrow precisions folded; every precision folded."""
    precisions = dict.fromkeys(column.precision for column in columns)
    wide = {column.precision for column in columns[:1]}
    for fold in ([], [p for p in precisions if p not in wide], list(precisions)):
        groups: dict[str, list[Column]] = {}
        for column in columns:
            above = column.precision or ""
            folds = column.precision in fold and sum(c.precision == column.precision for c in columns) > 1
            groups.setdefault(f"{above}\n{'worst' if folds else column.heading}", []).append(column)
        yield list(groups.items())


def table_of(reports: Sequence[Report], heading: str, groups: Sequence[Group], *, verdicts: bool) -> Table:
    """A row per report, if asked with its verdict and time. The names fold if there is no room for them."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    single = not any(title.partition("\n")[0] for title, _ in groups)
    table.add_column(heading, overflow="fold", min_width=12)
    for title, _ in groups:
        table.add_column(title.removeprefix("\n") if single else title, justify="right", no_wrap=True)
    if verdicts:
        table.add_column("\nresult", no_wrap=True)
        table.add_column("\ns", justify="right", no_wrap=True)
    for report in reports:
        row = [Text(visible(report.name)), *(cell_text(report, columns) for _, columns in groups)]
        if verdicts:
            row += [Text(report.verdict, "green" if report.passed else "red"), Text(f"{report.seconds:.1f}")]
        table.add_row(*row)
    return table


def cell_text(report: Report, columns: Sequence[Column]) -> Text:
    """The report's worst value in the columns: one that failed, else the one nearest to its limit."""
    found = [one for one in (cell(column, report.checks) for column in columns) if one is not None]
    if not found:
        return Text("–", "dim")
    worst = max(found, key=lambda one: (not one.passed, share(one, report)))
    return Text(worst.text, "" if worst.passed else "red")


def share(one: Cell, report: Report) -> float:
    """Share of its limit that a cell's value uses."""
    check = one.column.find(report.checks)
    return one.value / check.limit if check is not None and check.limit else one.value


def details(reports: Sequence[Report], console: Console) -> None:
    """Print results without a column: costs of the default precision, determinism, sweeps, trajectories.

    Those of a failed report are in its text, see `print_failure`.
    """
    for report in reports:
        if not report.passed:
            continue
        repeated = (check for check in report.checks if check.kind.startswith("two runs"))
        measured = (report.sweep, *report.trajectories)
        lines = [*map(str, report.costs), *map(str, repeated), *(str(one) for one in measured if one is not None)]
        if lines:
            console.print(Text(visible(report.name), "bold"))
            console.print(Text(folded("\n".join(lines), console.width)), soft_wrap=True)
