"""Reports in the terminal: progress, the tables, their legend and the stamp."""

import functools
from collections.abc import Callable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from parity.report.columns import Column, cell, legend, tables
from parity.report.report import Report
from parity.report.stamp import joined

WIDTH = 184  # of a table in a file, which cannot be widened afterwards; rich would wrap it at 80


def make_console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def progress_bar(names: Sequence[str], console: Console) -> Iterator[tuple[str, Callable[[str], None]]]:
    """Iterate over names with a progress bar; yields each name and a function that shows its current stage."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=name)
            yield name, functools.partial(show_stage, progress, task, name)
            progress.advance(task)


def show_stage(progress: Progress, task: TaskID, name: str, stage: str) -> None:
    progress.update(task, description=f"{name}: {stage}")


def print_failure(report: Report, console: Console) -> None:
    """Print a report in full if it failed."""
    if not report.passed:
        console.print(str(report), style="red", markup=False, highlight=False)


def summary(reports: Sequence[Report], console: Console) -> None:
    """Print the tables, the legend, the stamp, and everything else that was measured."""
    first, *others = tables([report.checks for report in reports])
    console.print(case_table(reports, *first))
    passed = sum(report.passed for report in reports)
    text = f"{passed} of {len(reports)} cases agree. {legend([report.checks for report in reports])}"
    console.print(text.rstrip(), markup=False, highlight=False, soft_wrap=True)
    stamp = ", ".join(f"{key} {value}" for key, value in joined(report.environment for report in reports).items())
    console.print(stamp, style="dim", markup=False, highlight=False, soft_wrap=True)
    for heading, columns in others:
        if columns:
            console.print(plain_table(reports, heading, columns))
    details(reports, console)


def case_table(reports: Sequence[Report], heading: str, columns: Sequence[Column]) -> Table:
    """The first table: a row per report, with its verdict and time."""
    table = empty_table(heading, [f"{column.precision}\n{column.heading}" for column in columns])
    table.add_column("\nresult")
    table.add_column("\ns", justify="right")
    for report in reports:
        color = "green" if report.passed else "red"
        verdict = f"[{color}]{report.verdict}[/]"
        table.add_row(report.name, *row(report, columns), verdict, f"{report.seconds:.1f}")
    return table


def plain_table(reports: Sequence[Report], heading: str, columns: Sequence[Column]) -> Table:
    table = empty_table(heading, [column.heading for column in columns])
    for report in reports:
        table.add_row(report.name, *row(report, columns))
    return table


def empty_table(heading: str, headings: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(heading, no_wrap=True)
    for text in headings:
        table.add_column(text, justify="right")
    return table


def row(report: Report, columns: Sequence[Column]) -> Iterator[str]:
    """The report's cells as rich markup."""
    for column in columns:
        one = cell(column, report.checks)
        yield "[dim]–[/]" if one is None else one.text if one.passed else f"[red]{one.text}[/]"


def details(reports: Sequence[Report], console: Console) -> None:
    """Print results without a column: costs of the default precision, determinism, sweeps, trajectories."""
    for report in reports:
        repeated = (check for check in report.checks if check.kind.startswith("two runs"))
        measured = (report.sweep, *report.trajectories)
        lines = [*map(str, report.costs), *map(str, repeated), *(str(one) for one in measured if one is not None)]
        if lines:
            console.print(report.name, style="bold", markup=False, highlight=False)
            console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
