"""Heat maps, histograms, curves and trees of a report, as HTML and SVG without references to other files."""

import math
from collections.abc import Mapping, Sequence

from parity.locate.tree import DECADES, MATERIAL, Errors, Part
from parity.report.page.style import SERIES
from parity.report.results import Row, Trajectory
from parity.report.text import escape

SCALE = 4.0  # the color scale ends at 10^SCALE times the limit
DASHES = ("none", "7 3", "2 2", "9 2 2 2", "5 5", "1 3")  # lines that lie on each other stay visible
VERDICTS = {  # of a sub-module: how it is shown, and its meaning
    "culprit": ("culprit", "differs in the run, and also when given PyTorch's inputs; nothing inside it explains that"),
    "encloses": ("encloses", "differs because a sub-module inside it does"),
    "victim": ("victim", "agrees when given PyTorch's inputs; in the run of the whole model it received wrong ones"),
    "agrees": ("agrees", "within its limit"),
    "not compared": ("not compared", "has outputs that cannot be compared, for the reason beside it"),
    "unmatched": ("no counterpart", "Flax calls no module in its place"),
}


def size(errors: Errors) -> str:
    """The error in units of the rounding noise; relative to the largest magnitude if the noise is not known."""
    return f"{errors.noise:.2g}×" if math.isfinite(errors.noise) else f"{errors.error:.0e}"


def color(share: float) -> str:
    """Color of an error by its share of the limit: greens up to the limit, then orange to red at 10^SCALE."""
    if not math.isfinite(share):
        return "hsl(0 75% 60%)"
    decades = math.log10(share) if share > 0 else -math.inf
    if share <= 1:
        return f"hsl({80 - 60 * min(max(decades, -1.0), 0.0):.0f} 60% 68%)"
    return f"hsl({45 * (1 - min(decades / SCALE, 1.0)):.0f} 75% 68%)"


def heat_map(rows: Sequence[Row]) -> str:
    """Table of the errors of every sub-module's outputs by dtype; '' if no layers were traced."""
    trees = {row.dtype: {part.path: part for part in row.parts.walk()} for row in rows if row.parts is not None}
    if not trees:
        return ""
    paths = list(dict.fromkeys(path for tree in trees.values() for path in tree))
    shown = [path for path in paths if any(path in tree and tree[path].propagated for tree in trees.values())]
    below, above = ([color(10.0**decade) for decade in decades] for decades in ((-1, -0.5, 0), (0.01, 2, SCALE)))
    ramps = [f'<i style="background: linear-gradient(90deg, {", ".join(ramp)})"></i>' for ramp in (below, above)]
    cells = {path: "".join(heat_cell(tree.get(path)) for tree in trees.values()) for path in shown}
    body = "".join(f'<tr><th scope="row">{path_of(path)}</th>{cells[path]}</tr>' for path in shown)
    heads = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in ("sub-module", *trees))
    left_out = len(paths) - len(shown)
    omitted = f" Sub-modules without comparable outputs are left out ({left_out})." if left_out else ""
    return f"""<p>Error of each sub-module's outputs in the run of the whole model, in units of the dtype's rounding
noise.{omitted}</p>
<p class="key">0.1 × limit {ramps[0]} limit {ramps[1]} {10**SCALE:,.0f} × limit</p>
<div class="scroll" role="region" aria-label="Error by sub-module and dtype" tabindex="0"><table class="heat">
<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"""


def path_of(path: str, parent: str = "") -> str:
    """Full path of a sub-module, its part below the parent emphasized."""
    if not path:
        return "<code><b>the model</b></code>"
    above = f"{parent}." if parent and path.startswith(f"{parent}.") else path[: path.rfind(".") + 1]
    return f'<code><span class="dim">{escape(above)}</span><b>{escape(path[len(above) :])}</b></code>'


def heat_cell(part: Part | None) -> str:
    if part is None or part.propagated is None:
        return "<td>–</td>"
    alone = f"; alone {size(part.isolated)}" if part.isolated else ""
    title = escape(f"{part.path or 'the model'}: {part.propagated}{alone}; limit {part.limit:.2g}×")
    share = part.propagated.noise / part.limit if part.limit else math.inf
    return f'<td class="value" style="background: {color(share)}" title="{title}">{size(part.propagated)}</td>'


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
        bars += f'<rect class="bars" {position}>{title}</rect>'
    positions = ((decade, (decade - low) * width) for decade in range(low, high + 1, 4))
    ticks = "".join(f'<text x="{x}" y="{height + 12}" text-anchor="middle">1e{d}</text>' for d, x in positions)
    equal = errors.size - sum(counts)
    axis = f'<line class="axis" x1="0" x2="{width * len(counts)}" y1="{height}" y2="{height}"/>'
    text = f"{caption}: {errors.size:,} outputs, {equal:,} of them bit-identical"
    box = f"-14 0 {width * len(counts) + 28} {height + 16}"
    return figure(f"Errors of the outputs in {caption}", box, bars + axis + ticks, escape(text))


def figure(label: str, box: str, drawing: str, caption: str) -> str:
    """Figure of a drawing with a viewBox at its own size, at most as wide as the page; caption: HTML."""
    _, _, width, height = box.split()
    size = f'viewBox="{box}" width="{width}" height="{height}" role="img" aria-label="{escape(label)}"'
    return f"<figure><svg {size}>{drawing}</svg><figcaption>{caption}</figcaption></figure>"


def curves(trajectory: Trajectory) -> str:
    """Values after each step, one line per kind, on a logarithmic scale; the caption has the loss.

    Zeros are at the bottom, infinities and NaN at the top.
    """
    kinds = {kind: [r.value for r in readings] for kind, readings in trajectory.by_kind().items()}
    limit = trajectory.readings[0].limit
    drawn = [v for values in (*kinds.values(), [limit]) for v in values if math.isfinite(v) and v > 0]
    low, high = math.floor(math.log10(min(drawn, default=1.0))), math.ceil(math.log10(max(drawn, default=1.0)))
    width, height, steps = 300, 120, max(map(len, kinds.values()))

    def y(value: float) -> float:
        value = min(max(value, 10.0**low), 10.0**high) if math.isfinite(value) else 10.0**high
        return height * (high - math.log10(value)) / max(high - low, 1)

    drawing, names = "", ""
    for i, (kind, values) in enumerate(kinds.items()):
        points = " ".join(f"{width * s / max(steps - 1, 1):.1f},{y(value):.1f}" for s, value in enumerate(values))
        mark = f'class="series-{i % SERIES + 1}" stroke-width="1.8" stroke-dasharray="{DASHES[i % len(DASHES)]}"'
        drawing += f'<polyline points="{points}" {mark}/>'
        swatch = f'<svg width="28" height="10" aria-hidden="true"><line x2="28" y1="5" y2="5" {mark}/></svg>'
        names += f'<span class="unit">{swatch}{escape(kind)}</span> '
    drawing += f'<line class="axis" x2="{width}" y1="{height}" y2="{height}"/>'
    if math.isfinite(limit):
        drawing += f'<line class="axis" stroke-dasharray="4 3" x2="{width}" y1="{y(limit):.1f}" y2="{y(limit):.1f}"/>'
        drawing += f'<text x="{width + 4}" y="{y(limit) + 3:.1f}">limit</text>'
    for decade in sorted({low, high}):
        drawing += f'<text x="-4" y="{y(10.0**decade) + 3:.1f}" text-anchor="end">1e{decade}</text>'
    drawing += f'<text x="0" y="{height + 12}">step 0</text>'
    drawing += f'<text x="{width}" y="{height + 12}" text-anchor="end">{steps - 1}</text>'
    at = trajectory.parted
    difference = "no step differs" if at is None else f"first difference at step {at.step}: {at.where}"
    first, last = trajectory.losses["torch"][0], trajectory.losses["torch"][-1]
    run = f"{trajectory.optimizer}, {trajectory.precision}"
    caption = f"{run}: loss {first:.4g} → {last:.4g}; {difference}"
    caption = f'<span class="key">{names}</span>{escape(caption)}'
    return figure(f"Differences after each step: {run}", f"-30 -6 {width + 58} {height + 22}", drawing, caption)


def verdict_tag(verdict: str) -> str:
    """The verdict on a sub-module, highlighted if something is wrong."""
    shown, _ = VERDICTS.get(verdict, (verdict, ""))
    return f'<span class="tag {escape(verdict.replace(" ", "-"))}">{escape(shown)}</span>'


def verdict_legend() -> str:
    """Meanings of the verdicts of a tree."""
    lines = "".join(f"<dt>{verdict_tag(verdict)}</dt><dd>{meaning}</dd>" for verdict, (_, meaning) in VERDICTS.items())
    return f'<dl class="legend">{lines}</dl>'


def tree(part: Part) -> str:
    """A sub-module and its children as nested lists, open down to the culprits that matter."""
    culprits = part.culprits()
    most = max((culprit.share or 0.0 for culprit in culprits), default=0.0)
    return f'<ul class="tree">{branch(part, [c for c in culprits if (c.share or 0.0) >= MATERIAL * most])}</ul>'


def branch(part: Part, culprits: Sequence[Part], parent: str = "") -> str:
    """A part as an item of a list. culprits: those to show at once, the first of them with its errors."""
    kinds = escape(" / ".join(dict.fromkeys(kind for kind in (part.torch_type, part.flax_type) if kind)))
    renamed = (
        f' <span class="dim">→ <code>{escape(part.flax_path)}</code></span>'
        if part.flax_path not in ("", part.path)
        else ""
    )
    measured = {"in the run": part.propagated, "alone": part.isolated}
    values = [f"{label} {size(errors)}" for label, errors in measured.items() if errors is not None]
    values += [f"{part.share:.0%} of the model's error"] if part.share is not None else []
    line = f'<span>{path_of(part.path, parent)}{renamed}</span> <span class="dim kind">{kinds}</span>'
    line += f" {verdict_tag(part.verdict)} <span>{' · '.join(values)}</span>"
    line += f' <span class="bad hint">{escape(part.hint)}</span>' if part.hint else ""
    line += f' <span class="dim hint">{escape(part.reason)}</span>' if part.reason else ""
    numbers = all_errors(part) if part.verdict in ("culprit", "victim") else ""
    inside = "".join(branch(child, culprits, part.path) for child in part.children)
    if not (inside or numbers):
        return f'<li><div class="leaf">{line}</div></li>'
    within = any(inner is culprit for culprit in culprits for child in part.children for inner in child.walk())
    opened = " open" if within or (culprits and part is culprits[0]) else ""
    inside = f"<ul>{inside}</ul>" if inside else ""
    return f"<li><details{opened}><summary>{line}</summary>{numbers}{inside}</details></li>"


def all_errors(part: Part) -> str:
    """Every error measure of a sub-module, in the run of the whole model and alone."""
    measured: Mapping[str, Errors | None] = {"in the run": part.propagated, "alone": part.isolated}
    return "".join(f"<p>{label}: {escape(str(e))}</p>" for label, e in measured.items() if e is not None)
