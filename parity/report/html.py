"""Reports as one self-contained HTML page."""

import math
from collections.abc import Sequence
from html import escape

from parity.report import charts
from parity.report.columns import Column, cell, legend, tables, unit_of
from parity.report.report import Report
from parity.report.results import Check
from parity.report.stamp import joined

STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #cf222e; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h3 { font-size: 1rem; margin: 1rem 0 .3rem 1.5rem; }
pre { margin: 0 0 1rem 1.5rem; font-size: .85em; overflow-x: auto; } details > p, details > ul { margin-left: 1.5rem; }
p { margin: .3rem 0 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; }
details { border-bottom: 1px solid var(--line); }
summary { padding: .4rem .2rem; cursor: pointer; display: flex; gap: 1rem; }
summary .name { flex: 1; font-weight: 600; }
details table { margin: 0 0 1rem 1.5rem; width: calc(100% - 1.5rem); font-size: .92em; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; } .dim { opacity: .65; }
.bar { display: inline-block; width: 120px; height: .6em; background: #8883; border-radius: 3px; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--good); } .bar i.over { background: var(--bad); }
.summary { overflow-x: auto; margin-bottom: 1rem; } .summary th { vertical-align: bottom; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; } dt { opacity: .65; } dd { margin: 0; }
"""

BAR = "The bar shows the share of the limit that is used; a check without a limit is only reported."
HEADINGS = "".join(f"<th>{heading}</th>" for heading in ("check", "precision", "worst", "limit", "of limit", "where"))


def page(reports: Sequence[Report]) -> str:
    """HTML text without references to other files or addresses."""
    passed = sum(report.passed for report in reports)
    verdict = "good" if passed == len(reports) else "bad"
    checks = [report.checks for report in reports]
    summaries = "".join(summary(reports, heading, columns) for heading, columns in tables(checks) if columns)
    run = joined(report.environment for report in reports)
    stamp = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in run.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Parity: {passed} of {len(reports)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}{charts.STYLE}</style></head><body>
<h1>Flax against PyTorch: <span class="{verdict}">{passed} of {len(reports)} cases agree</span></h1>
{summaries}<p class="dim">{escape(legend(checks))} {BAR}</p>
{"".join(map(section, reports))}
<h2>Run</h2><dl>{stamp}</dl>
</body></html>
"""


def summary(reports: Sequence[Report], heading: str, columns: Sequence[Column]) -> str:
    """Table of all reports, one row each."""
    headings = "".join(f"<th>{column.precision or ''}<br>{escape(column.heading)}</th>" for column in columns)
    rows = "".join(
        f"<tr><td>{escape(report.name)}</td>{''.join(summary_cell(report, column) for column in columns)}</tr>"
        for report in reports
    )
    return f"""<div class="summary"><table><tr><th>{escape(heading)}</th>{headings}</tr>{rows}</table></div>
"""


def summary_cell(report: Report, column: Column) -> str:
    found = cell(column, report.checks)
    if found is None:
        return '<td class="dim">–</td>'
    return f'<td class="{"" if found.passed else "bad"}">{escape(found.text)}</td>'


def section(report: Report) -> str:
    """One report as a collapsible section with its checks and charts; expanded if it failed."""
    verdict = f'<span class="{"good" if report.passed else "bad"}">{report.verdict.lower()}</span>'
    rows = "".join(map(row, report.checks))
    skipped = "".join(f'<p class="dim">– {escape(kind)}: {escape(why)}</p>' for kind, why in report.skipped.items())
    error = f"<pre>{escape(report.error.traceback)}</pre>" if report.error else ""
    return f"""<details{"" if report.passed else " open"}><summary><span class="name">{escape(report.name)}</span>
<span class="dim">{report.seconds:.1f} s</span>{verdict}</summary>{divergence(report)}
<table><tr>{HEADINGS}</tr>{rows}</table>{skipped}{error}{measured(report)}
</details>
"""


def row(check: Check) -> str:
    """One check with the share of its limit that is used."""
    used = min(1.0, check.value / check.limit) if check.limit else float(not check.passed)
    bar = f'<span class="bar"><i class="{"" if check.passed else "over"}" style="width:{100 * used:.1f}%"></i></span>'
    unit = unit_of(check)
    value = f'<span class="{"good" if check.passed else "bad"}">{escape(unit.full.format(check.value))}</span>'
    limit, bar = (escape(unit.limit.format(check.limit)), bar) if math.isfinite(check.limit) else ("–", "")
    fields = [escape(check.kind), check.precision, value, limit, bar, escape(check.worst)]
    return "<tr>" + "".join(f"<td>{field}</td>" for field in fields) + "</tr>"


def divergence(report: Report) -> str:
    """First divergence: the sentence, and the tree of each direction that was traced."""
    found = report.divergence
    if found is None:
        return ""
    trees = {"Outputs, in the order of the call": found.forward, "Gradients, from the loss back": found.backward}
    drawn = "".join(f"<h3>{title}</h3>{charts.tree(part)}" for title, part in trees.items() if part is not None)
    return f'<p class="bad">{escape(str(found))}</p>{drawn}'


def measured(report: Report) -> str:
    """Sweep, trajectories and costs of the default precision: heat map, histograms, curves, lists."""
    parts = []
    if report.sweep is not None:
        rows = report.sweep.rows
        if heat := charts.heat_map(rows):
            parts.append(f"<h3>Error by sub-module and dtype</h3>{heat}")
            parts.append(f'<h3>Errors of the outputs</h3><div class="charts">{charts.histograms(rows)}</div>')
        parts.append(f"<pre>{escape(str(report.sweep))}</pre>")
    if report.trajectories:
        figures = "".join(map(charts.curves, report.trajectories))
        parts.append(f'<h3>Training, step by step</h3><div class="charts">{figures}</div>')
    if report.costs:
        listed = "".join(f"<li>{escape(str(cost))}</li>" for cost in report.costs)
        parts.append(f"<h3>Errors at the default matmul precision</h3><ul>{listed}</ul>")
    return "".join(parts)
