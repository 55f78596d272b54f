"""Reports as one self-contained HTML page, and one report as the body of such a page, for notebooks."""

import math
from collections.abc import Iterable, Sequence

from parity.report.columns import Column, cell, legend, tables, unit_of
from parity.report.outcome import Outcome
from parity.report.page import charts
from parity.report.page.style import STYLE
from parity.report.results import Check
from parity.report.stamp import joined
from parity.report.text import escape

LINES = "\n"
BAR = "The bar shows the share of the limit that is used. A reading without a limit is only reported."


def page(reports: Sequence[Outcome]) -> str:
    """HTML page of the reports, without references to other files or addresses. A report that is alone is expanded."""
    title = headline(reports)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<style>{STYLE}</style></head><body class="parity"><main>
{body(reports)}</main></body></html>
"""


def fragment(report: Outcome) -> str:
    """HTML element of one report: the body of its page, with styles that apply inside it only."""
    return f'<div class="parity"><style>{STYLE}</style><main>\n{body([report])}</main></div>\n'


def headline(reports: Sequence[Outcome]) -> str:
    """Verdict on all reports."""
    if len(reports) == 1:
        return f"{reports[0].name}: {reports[0].verdict}"
    return f"Parity: {sum(report.passed for report in reports)} of {len(reports)} cases agree"


def body(reports: Sequence[Outcome]) -> str:
    """Headings, tables and sections of the reports."""
    verdict = "good" if all(report.passed for report in reports) else "bad"
    if len(reports) == 1:
        claim = f'{escape(reports[0].name)}: <span class="{verdict}">{reports[0].verdict}</span>'
    else:
        passed = sum(report.passed for report in reports)
        claim = f'Flax against PyTorch: <span class="{verdict}">{passed} of {len(reports)} cases agree</span>'
    run = joined(report.environment for report in reports)
    checks = [report.checks for report in reports]
    summaries = "".join(summary(reports, heading, columns) for heading, columns in tables(checks) if columns)
    stamp = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in run.items())
    return f"""<h1>{claim}</h1>
<p class="dim">{made_with(run, reports)}</p>
{summaries if len(reports) > 1 else ""}{"".join(section(*one, alone=len(reports) == 1) for one in enumerate(reports))}
<p class="dim">{escape(legend(checks))} {BAR}</p>
<h2>Run</h2>
<dl class="run">{stamp}</dl>
"""


def made_with(run: dict[str, str], reports: Sequence[Outcome]) -> str:
    """Date, versions and time on one line."""
    versions = [f"{name} {run[name]}" for name in ("torch", "jax", "flax") if name in run]
    seconds = f"{sum(report.seconds for report in reports):.1f} s"
    parts = [*([run["date"]] if "date" in run else []), *versions, seconds]
    return " · ".join(f'<span class="unit">{escape(part)}</span>' for part in parts)


def table(kind: str, label: str, head: Iterable[str], rows: Iterable[str]) -> str:
    """Table in a container of its own that scrolls, also by keyboard."""
    return (
        f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0"><table class="{kind}">'
        f"<thead><tr>{''.join(head)}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>\n"
    )


def summary(reports: Sequence[Outcome], heading: str, columns: Sequence[Column]) -> str:
    """Table of all reports, one row each."""
    titles = ["<br>".join(map(escape, dict.fromkeys([column.precision or "", column.heading]))) for column in columns]
    head = [f'<th scope="col">{title}</th>' for title in (escape(heading), *titles)]
    rows = (
        f'<tr><th scope="row"><a href="#report-{i}">{escape(report.name)}</a></th>'
        f"{''.join(summary_cell(report, column) for column in columns)}</tr>"
        for i, report in enumerate(reports)
    )
    return table("summary", f"Readings by {heading}", head, rows)


def summary_cell(report: Outcome, column: Column) -> str:
    found = cell(column, report.checks)
    if found is None:
        return '<td class="dim">–</td>'
    kind = "" if found.passed else ' class="bad"'
    return f"<td{kind}>{escape(found.text)}</td>"


def section(i: int, report: Outcome, *, alone: bool) -> str:
    """One report: collapsible, expanded if it failed; not collapsible if it is alone. i: its number on the page."""
    verdict = f'<span class="{"good" if report.passed else "bad"}">{report.verdict}</span>'
    level = 2 if alone else 3
    inside = divergence(report) + readings(report)
    inside += remarks(report, level) + trees(report, level) + measured(report, level)
    if alone:
        return inside
    opened = "" if report.passed else " open"
    return f"""<details{opened}><summary><h2>{escape(report.name)}</h2>
<span class="dim">{report.seconds:.1f} s</span>{verdict}</summary>
<div class="body" id="report-{i}">{inside}</div></details>
"""


def titled(level: int, title: str, content: str) -> str:
    """Content below a heading of a level; '' if there is none."""
    return f'<h{level} class="part">{title}</h{level}>{content}\n' if content else ""


def divergence(report: Outcome) -> str:
    """The exception that was raised, and the first divergence."""
    error = f'<p class="first bad">{escape(str(report.error))}</p>' if report.error else ""
    found = f'<p class="first bad">{escape(str(report.divergence))}</p>' if report.divergence else ""
    return error + found


def readings(report: Outcome) -> str:
    """Table of the checks; that of a report without any is left out."""
    if not report.checks:
        return ""
    own = any(check.own is not None for check in report.checks)
    titles = ["reading", "precision", "worst", *(["PyTorch"] if own else []), "limit"]
    head = [f'<th scope="col">{title}</th>' for title in titles]
    head += ['<th scope="col" class="wide">of limit</th><th scope="col">result</th>']
    head += ['<th scope="col" class="text">where</th>']
    return table("readings", f"Readings of {report.name}", head, (row(check, own) for check in report.checks))


def row(check: Check, own: bool) -> str:
    """One check with the share of its limit that is used; own: with PyTorch's own value."""
    unit, kind = unit_of(check), "good" if check.passed else "bad"
    limited = math.isfinite(check.limit)
    fields = [escape(check.precision), f'<span class="{kind}">{escape(unit.short.format(check.value))}</span>']
    if own:
        fields.append("–" if check.own is None else escape(unit.short.format(check.own)))
    fields.append(escape(unit.limit.format(check.limit)) if limited else "–")
    cells = "".join(f"<td>{field}</td>" for field in fields)
    cells += f'<td class="wide">{bar(check) if limited else ""}</td>'
    cells += f'<td><span class="{kind}">{"ok" if check.passed else "FAILED"}</span></td>'
    return f'<tr><th scope="row">{escape(check.kind)}</th>{cells}<td class="text">{escape(check.worst)}</td></tr>'


def bar(check: Check) -> str:
    """Share of the limit that is used, as a bar."""
    used = min(1.0, check.value / check.limit) if check.limit and check.value == check.value else 1.0 - check.passed
    over = "" if check.passed else ' class="over"'
    return f'<span class="bar" role="img" aria-label="{used:.0%}"><i{over} style="width:{100 * used:.1f}%"></i></span>'


def remarks(report: Outcome, level: int) -> str:
    """Notes, what was not compared, and the traceback of an exception."""
    traceback = f"<pre>{escape(report.error.traceback, keep=LINES)}</pre>" if report.error else ""
    return (
        titled(level, "Notes", listed(report.notes))
        + titled(level, "Not compared", listed(f"{kind}: {why}" for kind, why in report.skipped.items()))
        + titled(level, "Traceback", traceback)
    )


def listed(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def trees(report: Outcome, level: int) -> str:
    """The tree of each direction that was traced, with the meaning of the verdicts."""
    if report.divergence is None:
        return ""
    drawn = {"Outputs, in the order of the call": report.divergence.forward}
    drawn["Gradients, from the loss back"] = report.divergence.backward
    found = "".join(titled(level, title, charts.tree(part)) for title, part in drawn.items() if part is not None)
    return f"{found}{charts.verdict_legend()}\n" if found else ""


def measured(report: Outcome, level: int) -> str:
    """Sweep, trajectories and costs of the default precision: heat map, histograms, curves, lists."""
    found = ""
    if report.sweep is not None:
        rows = report.sweep.rows
        found += titled(level, "Error by sub-module and dtype", charts.heat_map(rows))
        found += titled(level, "Errors of the outputs", drawn(charts.histograms(rows)))
        found += titled(level, "Errors by dtype", f"<pre>{escape(str(report.sweep), keep=LINES)}</pre>")
    found += titled(level, "Training, step by step", drawn("".join(map(charts.curves, report.trajectories))))
    return found + titled(level, "Errors at the default matmul precision", listed(map(str, report.costs)))


def drawn(figures: str) -> str:
    return f'<div class="charts">{figures}</div>' if figures else ""
