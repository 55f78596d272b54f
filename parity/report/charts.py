"""Heat maps, histograms, curves and trees of a report, as HTML and SVG without references to other files."""

import math
from collections.abc import Mapping, Sequence
from html import escape

import ml_dtypes

from parity.locate.tree import DECADES, Errors, Part
from parity.report.results import Row, Trajectory

STYLE = """
.heat td { text-align: center; font-size: .85em; padding: .15rem .5rem; color: #111; }
.heat td:first-child { text-align: left; color: inherit; font-family: ui-monospace, monospace; }
.heat { width: auto !important; }
.key { display: inline-flex; align-items: center; gap: .4rem; font-size: .85em; }
.key i { display: inline-block; width: 160px; height: .7em; border-radius: 3px; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem 2rem; margin: .5rem 0 1rem 1.5rem; }
figure { margin: 0; } figcaption { font-size: .85em; opacity: .8; }
svg { overflow: visible; } svg text { font-size: 9px; fill: currentColor; opacity: .7; }
.tree { margin: .3rem 0 .6rem 1.5rem; } .tree .tree { margin: 0 0 0 1.2rem; }
.tree details { border: 0; } .tree summary { display: list-item; padding: .1rem; }
.tree p { margin: .1rem 0 .1rem 1.2rem; } .tree details p { font-size: .9em; }
.tree .tree > p { font-size: 1em; margin-left: 1rem; }
.tree code { font-size: .95em; } .tag { font-size: .8em; padding: 0 .4em; border-radius: 3px; background: #8883; }
.tag.culprit { background: var(--bad); color: #fff; } .tag.victim, .tag.encloses { background: #bf8700aa; }
"""
SCALE = 4.0  # the color scale ends at 10^SCALE rounding errors
COLORS = ["#2a78d6", "#eb6834", "#1baf7a", "#b88600", "#4a3aa7", "#e34948"]


def epsilon(dtype: str) -> float:
    return float(ml_dtypes.finfo(dtype).eps)


def color(error: float, dtype: str) -> str:
    """Color of an error: green at one rounding error of the dtype, red from 10^SCALE of them."""
    if not math.isfinite(error):
        return "hsl(0 75% 60%)"
    decades = math.log10(error / epsilon(dtype)) if error > 0 else 0.0
    return f"hsl({140 * (1 - min(max(decades / SCALE, 0.0), 1.0)):.0f} 60% 68%)"


def heat_map(rows: Sequence[Row]) -> str:
    """Table of the errors of every sub-module's outputs by dtype; '' if no layers were traced."""
    trees = {row.dtype: {part.path: part for part in row.parts.walk()} for row in rows if row.parts is not None}
    if not trees:
        return ""
    paths = list(dict.fromkeys(path for tree in trees.values() for path in tree))
    ramp = ", ".join(f"hsl({140 - 35 * i} 60% 68%)" for i in range(5))
    cells = {path: "".join(heat_cell(tree.get(path), dtype) for dtype, tree in trees.items()) for path in paths}
    body = "".join(f"<tr><td>{indented(path)}</td>{cells[path]}</tr>" for path in paths)
    return f"""<p class="key">1 rounding error of the dtype <i style="background: linear-gradient(90deg, {ramp})"></i>
10,000 · error of each sub-module's outputs in the run of the whole model, relative to their largest magnitude</p>
<table class="heat"><tr><th>sub-module</th>{"".join(f"<th>{dtype}</th>" for dtype in trees)}</tr>{body}</table>"""


def indented(path: str) -> str:
    """Last name of a path, indented by its depth."""
    depth = path.count(".") + 1 if path else 0
    return "&nbsp;" * 3 * depth + escape(path.rpartition(".")[2] or "the model")


def heat_cell(part: Part | None, dtype: str) -> str:
    if part is None or part.propagated is None:
        return "<td>–</td>"
    alone = f"; alone {part.isolated.error:.1e}" if part.isolated else ""
    title = escape(f"{part.path or 'the model'}: {part.propagated}{alone}")
    error = part.propagated.error
    return f'<td style="background: {color(error, dtype)}" title="{title}">{error:.0e}</td>'


def histograms(rows: Sequence[Row]) -> str:
    """Distribution of the errors of the model's outputs, one chart per dtype."""
    charts = [(row.dtype, row.parts.propagated) for row in rows if row.parts is not None]
    return "".join(histogram(dtype, errors) for dtype, errors in charts if errors is not None)


def histogram(caption: str, errors: Errors) -> str:
    low, high = DECADES
    counts = list(errors.histogram)
    tallest, width, height = max(counts) or 1, 12, 70
    bars = ""
    for i, n in enumerate(counts):
        tall, title = height * n / tallest, f"<title>1e{low + i} to 1e{low + i + 1}: {n}</title>"
        position = f'x="{i * width}" y="{height - tall:.1f}" width="{width - 2}" height="{tall:.1f}"'
        bars += f'<rect {position} fill="{COLORS[0]}">{title}</rect>'
    positions = ((decade, (decade - low) * width) for decade in range(low, high + 1, 4))
    ticks = "".join(f'<text x="{x}" y="{height + 11}" text-anchor="middle">1e{d}</text>' for d, x in positions)
    equal = errors.size - sum(counts)
    axis = f'<line x1="0" x2="{width * len(counts)}" y1="{height}" y2="{height}" stroke="currentColor" opacity=".4"/>'
    return f"""<figure><svg width="{width * len(counts)}" height="{height + 16}" role="img">{bars}{axis}{ticks}</svg>
<figcaption>{escape(caption)}: {errors.size:,} outputs, {equal:,} of them bit-identical</figcaption></figure>"""


def curves(trajectory: Trajectory) -> str:
    """Errors after each step, one line per kind; the caption has the loss."""
    kinds = {kind: [max(r.value, 1e-18) for r in readings] for kind, readings in trajectory.by_kind().items()}
    limit = trajectory.readings[0].limit
    finite = [value for values in kinds.values() for value in values if math.isfinite(value)] + [limit]
    low, high = math.floor(math.log10(min(finite))), math.ceil(math.log10(max(finite)))
    width, height, steps = 320, 120, max(map(len, kinds.values()))

    def y(value: float) -> float:
        value = min(max(value, 10.0**low), 10.0**high) if math.isfinite(value) else 10.0**high
        return height * (high - math.log10(value)) / max(high - low, 1)

    def line(values: Sequence[float], hue: str) -> str:
        points = " ".join(f"{width * i / max(steps - 1, 1):.1f},{y(v):.1f}" for i, v in enumerate(values))
        return f'<polyline points="{points}" fill="none" stroke="{hue}" stroke-width="1.5"/>'

    lines = "".join(line(values, hue) for values, hue in zip(kinds.values(), COLORS, strict=False))
    level = f'y1="{y(limit):.1f}" y2="{y(limit):.1f}"'
    dashed = f'<line x1="0" x2="{width}" {level} stroke="currentColor" stroke-dasharray="4 3"/>'
    names = "".join(
        f'<text x="{width + 6}" y="{12 + 12 * i}" style="fill: {hue}; opacity: 1">{escape(kind)}</text>'
        for i, (kind, hue) in enumerate(zip(kinds, COLORS, strict=False))
    )
    scale = "".join(
        f'<text x="-6" y="{y(10.0**d) + 3:.1f}" text-anchor="end">1e{d}</text>' for d in sorted({low, high})
    )
    at = trajectory.parted
    difference = "no step differs" if at is None else f"first difference at step {at.step}: {at.where}"
    first, last = trajectory.losses["torch"][0], trajectory.losses["torch"][-1]
    scale += f'<text x="0" y="{height + 11}">step 0</text>'
    scale += f'<text x="{width}" y="{height + 11}" text-anchor="end">{steps - 1}</text>'
    run = f"{trajectory.optimizer}, {trajectory.precision}"
    caption = f"{run}: loss {first:.4g} → {last:.4g}; {difference} (dashed: limit)"
    drawing = f'<svg width="{width + 130}" height="{height + 14}" role="img">{dashed}{lines}{names}{scale}</svg>'
    return f'<figure style="margin-left: 30px">{drawing}<figcaption>{escape(caption)}</figcaption></figure>'


def tree(part: Part, depth: int = 0) -> str:
    """A sub-module and its children as nested <details>, open down to every culprit."""
    has_culprit = any(inner.verdict == "culprit" for inner in part.walk())
    name = escape(part.path.rpartition(".")[2] or "the model")
    kinds = escape(" / ".join(kind for kind in (part.torch_type, part.flax_type) if kind))
    values = " · ".join(
        f"{label} {errors.error:.1e}"
        for label, errors in (("in the run", part.propagated), ("alone", part.isolated))
        if errors is not None
    )
    verdict = f'<span class="tag {part.verdict}">{part.verdict}</span>'
    line = f'<code>{name}</code> <span class="dim">{kinds}</span> {verdict} {values}'
    hint = f"<p>{escape(part.hint)}</p>" if part.hint else ""
    numbers = all_errors(part) if part.verdict in ("culprit", "victim", "encloses") else ""
    inside = "".join(tree(child, depth + 1) for child in part.children)
    if not (inside or numbers or hint):
        return f'<div class="tree"><p>{line}</p></div>'
    opened = " open" if has_culprit else ""
    return f'<div class="tree"><details{opened}><summary>{line}</summary>{hint}{numbers}{inside}</details></div>'


def all_errors(part: Part) -> str:
    """Every error measure of a sub-module, in the run of the whole model and alone."""
    measured: Mapping[str, Errors | None] = {"in the run": part.propagated, "alone": part.isolated}
    return "".join(f"<p>{label}: {escape(str(e))}</p>" for label, e in measured.items() if e is not None)
