"""Reports as plain text, in the order in which a reader needs them."""

import html
import textwrap
from collections.abc import Iterator

from jaxmodels.process.texts import visible
from parity.report.columns import unit_of
from parity.report.outcome import Outcome

WIDTH = 100


def escape(text: str, keep: str = "") -> str:
    """Text in HTML; control characters are shown as escapes, except those to keep."""
    return html.escape(visible(text, keep))


def text(outcome: Outcome, width: int = WIDTH) -> str:
    """The whole report: verdict, first divergence, failed readings, passed readings, notes, and all other results."""
    return "\n".join(
        [*heading(outcome, width), *passed(outcome, width), *remarks(outcome, width), *others(outcome, width)]
    )


def short(outcome: Outcome, width: int = WIDTH) -> str:
    """Verdict, first divergence and failed readings; passed ones are only counted."""
    agree = sum(check.passed for check in outcome.checks)
    counted = [f"  {agree} {'reading' if agree == 1 else 'readings'} within the limits"] if agree else []
    return "\n".join([*heading(outcome, width), *counted, *remarks(outcome, width)])


def heading(outcome: Outcome, width: int) -> Iterator[str]:
    """The verdict, the exception that was raised, the first divergence, and the failed readings."""
    yield from wrapped(f"{outcome.name}: {outcome.verdict}", width, indent=0)
    if outcome.error:
        yield from wrapped(str(outcome.error), width)
    if outcome.divergence:
        yield from wrapped(str(outcome.divergence), width)
    for check in outcome.checks:
        if not check.passed:
            yield from wrapped(str(check), width)


def passed(outcome: Outcome, width: int) -> Iterator[str]:
    """Readings within their limits: a line each if all are, else a paragraph per precision."""
    checks = [check for check in outcome.checks if check.passed]
    if len(checks) == len(outcome.checks):
        for check in checks:
            yield from wrapped(str(check), width)
        return
    for precision in dict.fromkeys(check.precision for check in checks):
        values = (f"{c.kind} {unit_of(c).full.format(c.value)}" for c in checks if c.precision == precision)
        yield from wrapped(f"ok     {precision}: {', '.join(values)}", width)


def remarks(outcome: Outcome, width: int) -> Iterator[str]:
    """Notes, and what was not compared."""
    for note in outcome.notes:
        yield from wrapped(f"note   {note}", width)
    for kind, why in outcome.skipped.items():
        yield from wrapped(f"–      {kind}: {why}", width)


def others(outcome: Outcome, width: int) -> Iterator[str]:
    """Costs of the default matmul precision, the sweep and the trajectories."""
    for cost in outcome.costs:
        yield from wrapped(str(cost), width)
    for result in (outcome.sweep, *outcome.trajectories):
        if result is not None:
            yield folded(str(result), width)


def folded(lines: str, width: int = WIDTH) -> str:
    """Lines with an indentation of their own, continued deeper if they are wider than `width`."""
    found = []
    for line in visible(lines, keep="\n").splitlines():
        margin = " " * (len(line) - len(line.lstrip()) + 4)
        found += textwrap.wrap(line, max(width, 20), subsequent_indent=margin[: width // 2], break_on_hyphens=False)
    return "\n".join(found)


def wrapped(line: str, width: int, indent: int = 2) -> list[str]:
    """A line, continued below its text if it is wider than `width`."""
    margin = " " * indent
    below = margin + " " * (7 if indent else 2)  # the width of 'FAILED '
    return textwrap.wrap(
        visible(line), max(width, 20), initial_indent=margin, subsequent_indent=below, break_on_hyphens=False
    )
