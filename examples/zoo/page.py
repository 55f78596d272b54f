"""docs/zoo.md from the stored results."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from examples.zoo.truth import Cause, differs
from jaxmodels.process.texts import table_cell

HEAD = """# The Flax models of transformers

Written by `make zoo` (`python -m examples.zoo`): the Flax ports that transformers {version} shipped, each compared with
its PyTorch original, tiny and with random weights. They were written by others, and nothing is told about them: no
mapping of names, no tolerance. "names" says if the pair was compared as it is, or with the names that `parity.suggest`
found. The difference is in units of each tensor's own rounding noise, the largest of outputs, gradients and {steps}
steps of training in float64; the limit is 32. A port that holds a constant in float32 may be as far from PyTorch as the
rounding of that constant explains; the line is named.

- {right} of {total} pairs judged truly: {agree} agree, {differ} differ
- largest difference of a port that agrees: {worst} × noise; of one with a constant in float32: {narrow} × noise
- {seconds} s in all; {software}
"""
ROW = "| {name} | {verdict} | {noise} | {names} | {seconds:.0f} | {remark} |"


def page(results: Mapping[str, Mapping[str, Any]], causes: Mapping[str, tuple[Cause, str, str]]) -> str:
    """The page; causes: by pair, with the lines of both sides. Raises ValueError if there are no results."""
    if not results:
        raise ValueError("results is empty; run at least one pair")
    first = next(iter(results.values()))
    agreeing = [r for r in results.values() if r["verdict"] == "agrees"]
    head = HEAD.format(
        version=first["software"]["transformers"],
        steps=first["steps"],
        right=sum(true(name, result) for name, result in results.items()),
        total=len(results),
        agree=len(agreeing),
        differ=sum(r["verdict"] == "differs" for r in results.values()),
        worst=largest(r for r in agreeing if not r["narrow"]),
        narrow=largest(r for r in agreeing if r["narrow"]),
        seconds=round(sum(r["seconds"] for r in results.values())),
        software=", ".join(f"{name} {version}" for name, version in sorted(first["software"].items())),
    )
    lines = [head, "| pair | verdict | × noise | names | seconds | |", "|---|---|---|---|---|---|"]
    lines += [row(name, result) for name, result in results.items()]
    known = [name for name in results if name in causes]
    if known:
        lines += ["", "## Ports that differ", ""]
        lines += told(known, causes)
    return "\n".join(lines) + "\n"


def row(name: str, result: Mapping[str, Any]) -> str:
    """A line of the table."""
    remark = result["remark"]
    if result["narrow"]:
        remark = f"{remark}; float32 in {', '.join(result['narrow'])}".lstrip("; ")
    if not true(name, result):
        remark = f"**judged wrongly**: {remark}".rstrip(": ")
    return ROW.format(
        name=table_cell(name),
        verdict=result["verdict"],
        noise=times(number(result["noise"])),
        names=result["names"],
        seconds=result["seconds"],
        remark=table_cell(remark),
    )


def told(names: Sequence[str], causes: Mapping[str, tuple[Cause, str, str]]) -> list[str]:
    """The causes, one for all pairs that share its sentence."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(causes[name][0].sentence, []).append(name)
    lines = []
    for sentence, pairs in groups.items():
        places = dict.fromkeys(f"`{side}`" for name in pairs for side in causes[name][1:])
        lines.append(f"- **{', '.join(pairs)}**: {sentence} ({', '.join(places)})")
    return lines


def true(name: str, result: Mapping[str, Any]) -> bool:
    """True if the verdict is right."""
    return result["verdict"] == ("differs" if differs(name) else "agrees")


def largest(results: Iterable[Mapping[str, Any]]) -> str:
    """The largest difference of some results."""
    return times(max((number(r["noise"]) for r in results), default=0.0))


def number(value: Any) -> float:
    """A stored number; JSON has no infinities."""
    return float("nan") if value is None else float(value)


def times(value: float) -> str:
    """A multiple of the noise for the table."""
    if not math.isfinite(value):
        return "" if math.isnan(value) else "∞"
    return f"{value:.2g}" if value < 1e3 else f"{value:.0e}"
