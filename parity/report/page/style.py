"""Style of the HTML report: colors for a light and a dark scheme, and rules that apply inside the report only."""

import re

# Name: color in the light scheme, in the dark scheme. Text has a contrast of at least 4.5 (WCAG AA) on its background.
PALETTE = {
    "page": ("#ffffff", "#14171c"),
    "panel": ("#f3f5f7", "#1f242b"),
    "text": ("#1f2328", "#e6edf3"),
    "dim": ("#56606b", "#a3adb8"),
    "line": ("#d1d9e0", "#3a424c"),
    "good": ("#116329", "#4ac26b"),
    "bad": ("#b3161c", "#ff8078"),
    "focus": ("#0969da", "#58a6ff"),
    "culprit": ("#b3161c", "#ff8078"),
    "on-culprit": ("#ffffff", "#240604"),
    "victim": ("#ffe7a3", "#5a4300"),
    "on-victim": ("#4d3300", "#ffe9a8"),
    "plain": ("#e4e8ec", "#2f363f"),
    "on-plain": ("#3c444d", "#d0d8e0"),
    "on-heat": ("#111111", "#111111"),
    "series-1": ("#1f66c1", "#6cb0ff"),
    "series-2": ("#c2410c", "#ff9d5c"),
    "series-3": ("#0f7a4f", "#3fd39b"),
    "series-4": ("#7a5c00", "#e0b93f"),
    "series-5": ("#5b3cc4", "#b9a5ff"),
    "series-6": ("#b3164f", "#ff85b0"),
}
SERIES = 6

# An id that no element has: its specificity puts the rules before those of a notebook.
ROOT = ".parity:not(#_)"
# Pages that have a scheme of their own, whatever the system's: JupyterLab, VS Code, Colab, MkDocs Material.
LIGHT = ["[data-jp-theme-light=true]", ".vscode-light", "html[theme=light]", "[data-md-color-scheme=default]"]
DARK = ["[data-jp-theme-light=false]", ".vscode-dark", "html[theme=dark]", "[data-md-color-scheme=slate]"]

RULES = """
{ box-sizing: border-box; margin: 0; background: var(--page); color: var(--text); overflow-wrap: anywhere }
{ font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; text-align: left }
main { display: block; max-width: 1100px; margin: 0 auto; padding: 1.5rem 1rem 2rem }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .3rem; font-weight: 600; color: inherit }
h2 { font-size: 1.15rem; margin: 1.5rem 0 .4rem; font-weight: 600; color: inherit }
h2.part, h3.part { font-size: 1rem; margin: 1.2rem 0 .3rem; font-weight: 600; color: inherit }
p { margin: .3rem 0 .8rem }
ul { margin: .3rem 0 .8rem; padding-left: 1.3rem; list-style: disc }
pre { margin: .5rem 0 1rem; padding: .6rem .8rem; font-size: .85em; overflow-x: auto; white-space: pre }
pre { background: var(--panel); color: inherit; font-family: ui-monospace, monospace; border-radius: 4px }
code { font-family: ui-monospace, monospace; font-size: .95em; background: none; color: inherit; padding: 0 }
code b { font-weight: 600 }
a { color: inherit; text-decoration: underline; text-underline-offset: .2em }
a:focus-visible { outline: 2px solid var(--focus); outline-offset: 2px }
.good { color: var(--good) }
.bad { color: var(--bad); font-weight: 600 }
.dim { color: var(--dim) }
.unit { display: inline-block }
.first { border-left: 4px solid var(--bad); padding: .5rem .8rem; background: var(--panel) }
.scroll { overflow-x: auto; margin: .4rem 0 1rem; max-width: 100% }
.scroll { background: linear-gradient(to right, var(--page) 40%, transparent) left / 40px 100% no-repeat local,
 linear-gradient(to left, var(--page) 40%, transparent) right / 40px 100% no-repeat local,
 linear-gradient(to right, var(--line), transparent) left / 12px 100% no-repeat scroll,
 linear-gradient(to left, var(--line), transparent) right / 12px 100% no-repeat scroll }
.scroll:focus-visible { outline: 2px solid var(--focus); outline-offset: 2px }
table { border-collapse: collapse; margin: 0; font-size: .93em; table-layout: auto; border: 0 }
tr { background: none }
th, td { padding: .3rem .6rem; border: 0; border-bottom: 1px solid var(--line); text-align: right; max-width: none }
th, td { white-space: nowrap; background: none; overflow-wrap: normal; vertical-align: middle; line-height: 1.4 }
th { font-weight: 600; color: inherit }
thead th { vertical-align: bottom }
th:first-child { text-align: left }
tbody th { font-weight: 400; position: sticky; left: 0; background: var(--page) }
tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 13rem; max-width: 30rem }
td.text, th.text { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 9rem }
.bar { display: inline-block; width: 100px; height: .6em; background: var(--plain); border-radius: 3px }
.bar { overflow: hidden; vertical-align: middle }
.bar i { display: block; height: 100%; background: var(--good) }
.bar i.over { background: var(--bad) }
details { border: 0; border-bottom: 1px solid var(--line) }
summary { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 .6rem; padding: .6rem .3rem; cursor: pointer }
summary { list-style: none; border-radius: 4px; min-height: 44px }
summary::-webkit-details-marker { display: none }
summary::before { content: ""; width: .5em; height: .5em; margin: 0 .25em .15em .1em; flex: none }
summary::before { border: solid var(--text); border-width: 0 2px 2px 0; transform: rotate(-45deg) }
details[open] > summary::before { transform: rotate(45deg) }
summary:hover { background: var(--panel) }
summary:focus-visible { outline: 2px solid var(--focus); outline-offset: -2px }
summary h2 { flex: 1 1 8rem; margin: 0 }
.body { padding: 0 0 1rem 1.3rem }
dl.run { display: grid; grid-template-columns: fit-content(45%) minmax(0, 1fr); gap: .1rem 1rem; margin: 0 }
dt { color: var(--dim); font-weight: 400 }
dd { margin: 0 }
dl.legend { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .3rem .8rem; margin: .3rem 0 .8rem }
dl.legend { font-size: .93em; align-items: baseline }
.tag { font-size: .85em; padding: .05em .5em; border-radius: 3px; white-space: nowrap }
.tag { background: var(--plain); color: var(--on-plain) }
.tag.culprit { background: var(--culprit); color: var(--on-culprit) }
.tag.victim, .tag.encloses { background: var(--victim); color: var(--on-victim) }
.tree, .tree ul { list-style: none; margin: .2rem 0; padding: 0 }
.tree ul { padding-left: 1.1rem; border-left: 1px solid var(--line); margin-left: .5rem }
.tree details { border: 0 }
.tree summary, .tree .leaf { display: block; position: relative; padding: .25rem .3rem .25rem 1.6rem }
.tree summary { min-height: 32px }
.tree summary::before { position: absolute; left: .35rem; top: .7rem; margin: 0 }
.tree .kind { margin: 0 .25rem }
.tree .hint { display: block }
.tree p { margin: 0 0 .2rem 1.6rem; font-size: .93em }
.heat td { text-align: center; color: var(--dim) }
.heat td.value { color: var(--on-heat) }
.key { display: flex; flex-wrap: wrap; align-items: center; gap: .1rem .6rem; font-size: .93em; margin: .2rem 0 .6rem }
.key i { display: inline-block; width: 90px; height: .8em; border-radius: 3px }
.charts { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: .5rem 0 1rem }
figure { margin: 0; max-width: 100% }
figcaption { font-size: .93em; max-width: 24rem }
svg { display: block; max-width: 100%; height: auto; overflow: visible }
svg text { font-size: 10px; fill: var(--dim) }
svg .axis { stroke: var(--dim); fill: none }
svg .bars { fill: var(--series-1) }
.key .unit { display: inline-flex; align-items: center; gap: .3rem }
.key svg { display: inline-block; flex: none; overflow: hidden }
"""
NARROW = """
.body { padding-left: .3rem }
th, td { padding: .3rem .4rem }
tbody th { min-width: 7.5rem }
.wide { display: none }
.tree ul { padding-left: .5rem; margin-left: .4rem }
"""
PRINT = """
main { max-width: none; padding: 0 }
.scroll, pre { overflow: visible }
.scroll { background: none }
pre { white-space: pre-wrap }
th, td { white-space: normal; padding: .2rem .3rem }
tbody th { position: static }
table { font-size: 8pt }
tr, figure, .leaf, summary { break-inside: avoid }
h2, h3, summary { break-after: avoid }
details::details-content { content-visibility: visible; block-size: auto; display: block }
.bar, .bar i, .tag, .heat td, .key i { print-color-adjust: exact }
"""


def rules(css: str) -> str:
    """Rules whose selectors apply inside the report only; an empty selector is the report itself."""
    lines = []
    for selectors, declarations in re.findall(r"([^{}]*)\{([^{}]*)\}", css):
        scoped = ", ".join(f"{ROOT} {selector.strip()}".rstrip() for selector in selectors.split(","))
        lines.append(f"{scoped} {{{declarations.rstrip()} }}")
    return "\n".join(lines)


def scheme(name: str, within: list[str] | None = None) -> str:
    """Rule that sets the colors of the light or dark scheme, inside elements of an application if those are given."""
    roots = [f"{selector} {ROOT}" for selector in within or []] or [ROOT]
    index = ("light", "dark").index(name)
    colors = "; ".join(f"--{color}: {values[index]}" for color, values in PALETTE.items())
    return f"{', '.join(roots)} {{ color-scheme: {name}; {colors} }}"


STYLE = f"""
{scheme("light")}
@media (prefers-color-scheme: dark) {{
{scheme("dark")}
}}
{scheme("light", LIGHT)}
{scheme("dark", DARK)}
{rules(RULES)}
{rules("".join(f"svg .series-{i} {{ stroke: var(--series-{i}); fill: none }}" for i in range(1, SERIES + 1)))}
@media (max-width: 640px) {{
{rules(NARROW)}
}}
@media print {{
{scheme("light")}
{scheme("light", DARK)}
{rules(PRINT)}
}}
"""
