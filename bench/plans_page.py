"""The page docs/plans.md, from the rows that `bench.plans` and `bench.maxtext` stored."""

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
GIB = 2**30
HEAD = """\
# Plans for TPUs

Training steps compiled for TPU slices on a machine without TPUs, with jax {jax} and libtpu {libtpu}. Written by
`make plans`. No step of this page has run on a TPU; [Training on TPUs](guides/tpu.md) explains the planner.

- **HBM**: peak per chip in the compiler's buffer report, arguments included. The compiler finds room for the buffers of
  every step that has a peak here.
- **PFLOP**: of the matrix products of a step on all chips, without recomputation.
- **Accessed**: HBM read and written by a chip in a step, each operand of an instruction once, in GiB.
- **Sent**: by a chip in the collectives of a step, in GiB.
- **At least**: the largest of three lower bounds of a step's time, and which it is: matrix products at the chip's peak,
  HBM at its bandwidth, or collectives on the links along their mesh axes. They are not forecasts.
- **Compiled**: processor seconds to trace the step, and to compile it until its buffers are placed. Code, which takes
  the compiler minutes more, is not generated.

All language models on `train.neox` have AdamW, float32 parameters and moments, bfloat16 computation, rematerialized
layers, and, if the step does not say otherwise, sequences of 2048 tokens.
"""


def page(rows: Sequence[Row], missing: Sequence[tuple[str, str]], maxtext: Sequence[Row]) -> str:
    """Text of the page. missing: slice and name of each step that is not compiled."""
    versions = rows[0]["versions"] if rows else {"jax": "?", "libtpu": "?"}
    parts = [HEAD.format(**versions)]
    parts.append(section("Scripts", "Presets of the scripts, on the smallest slice.", rows, "scripts"))
    parts.append(
        section(
            "Pythia and GPT-NeoX",
            "Parameters and optimizer are divided over all chips (`fsdp`).",
            [row for row in rows if row["table"] == "pythia"],
            "pythia",
        )
    )
    parts.append(
        section(
            "Long context",
            "Pythia-1.4B's sizes on sequences of 8,192 and 32,768 tokens, each on one chip: nothing is divided along "
            "the sequence.",
            rows,
            "context",
        )
    )
    parts.append(section("GPT-NeoX-20B", twenty(rows), [row for row in rows if "peak" in row], "neox_20b"))
    parts.append(held(rows))
    parts.append(peers(rows, maxtext))
    if missing:
        slices = dict.fromkeys(topology for topology, _ in missing)
        named = {slice_: ", ".join(name for topology, name in missing if topology == slice_) for slice_ in slices}
        parts.append(
            f"## Not compiled yet\n\n{len(missing)} steps have no row above; `make plans` goes on with them:\n\n"
            + "\n".join(f"- `{slice_}`: {names}" for slice_, names in named.items())
            + "\n"
        )
    return "\n".join(part for part in parts if part)


def section(title: str, text: str, rows: Sequence[Row], table: str) -> str:
    chosen = [row for row in rows if row["table"] == table]
    if not chosen:
        return ""
    columns: dict[str, Callable[[Row], str]] = {
        "step": lambda row: row["name"],
        "slice": lambda row: f"{row['topology']}{' ' + row['mesh'] if 'tensor' in row['mesh'] else ''}",
        "sequences per chip": lambda row: f"{row['sequences']:g}",
        "HBM, GiB": lambda row: f"{row['peak'] / GIB:.3g} of {row['limit'] / GIB:.4g}",
        "PFLOP": lambda row: f"{row['flops'] / 1e15:.3g}",
        "accessed": lambda row: f"{row['accessed'] / GIB:.3g}",
        "sent": sent,
        "at least": lambda row: f"{1e3 * row['least']:.3g} ms, {row['bound']}",
        "compiled": lambda row: f"{row['processor_seconds']:.0f}",
    }
    lines = []
    for row in chosen:
        if "peak" in row:
            lines.append([show(row) for show in columns.values()])
        else:
            needs = f"needs {row['need']:.4g} of {row['limit']:.4g}: refused"
            lines.append([row["name"], row["topology"], f"{row['sequences']:g}", needs, *[""] * (len(columns) - 4)])
    return f"## {title}\n\n{text}\n\n{markdown(list(columns), lines)}\n"


def sent(row: Row) -> str:
    """Bytes that a chip sends by kind and axis; those below a hundredth of all are left out."""
    total = sum(each["moved"] for each in row["collectives"])
    shown = [each for each in row["collectives"] if each["moved"] > 0.01 * total]
    kinds = [
        f"{each['kind'].removeprefix('collective-')} {each['axes'].replace('·', '+')} {each['moved'] / GIB:.2g}"
        for each in shown
    ]
    return ", ".join(kinds) or "none"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table = [list(head), ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def twenty(rows: Sequence[Row]) -> str:
    """Lines on the smallest slice of each generation that holds the model, and the most sequences per chip there."""
    own = [row for row in rows if row["table"] == "neox_20b" and "tensor" not in row["mesh"]]
    lines = []
    for generation in dict.fromkeys(row["topology"].partition(":")[0] for row in own):
        of = [row for row in own if row["topology"].startswith(generation + ":")]
        fitting = sorted((row for row in of if "peak" in row), key=lambda row: (row["chips"], row["sequences"]))
        if not fitting:
            continue
        slice_ = fitting[0]["topology"]
        most = max((row for row in fitting if row["topology"] == slice_), key=lambda row: row["sequences"])
        refused = [row for row in of if "need" in row]
        smaller = [row for row in refused if row["topology"] != slice_]
        line = f"- {generation}: `{slice_}` holds it"
        line += "".join(f"; `{r['topology']}` needs {r['need']:.4g} of {r['limit']:.4g} GiB" for r in smaller)
        line += "" if smaller else "; smaller slices were not compiled"
        more = [row for row in refused if row["topology"] == slice_ and row["sequences"] == most["sequences"] + 1]
        if more:
            line += f". Most sequences per chip: {most['sequences']:g}; {more[0]['sequences']:g} need "
            line += f"{more[0]['need']:.4g} GiB."
        else:
            line += f". Sequences per chip: {most['sequences']:g}; more were not compiled."
        lines.append(line)
    return "The smallest slice of each generation that holds the model with AdamW:\n\n" + "\n".join(lines)


def held(rows: Sequence[Row]) -> str:
    """Table of what the steps hold at their peak, by kind."""
    chosen = [row for row in rows if row.get("parts") and row["table"] != "scripts"]
    if not chosen:
        return ""
    kinds = ["parameters", "optimizer", "gradients", "gathered weights", "weights in the compute dtype"]
    kinds += ["saved activations", "activations", "logits"]
    lines = []
    for row in chosen:
        named = [row["parts"].get(kind, 0) / GIB for kind in kinds]
        cells = [f"{size:.2f}" for size in (*named, row["peak"] / GIB - sum(named))]
        lines.append([row["name"], row["topology"], f"{row['sequences']:g}", *cells])
    head = ["step", "slice", "sequences per chip", *kinds, "other"]
    text = (
        "GiB of a chip's HBM, by kind. Saved activations wait for the backward pass; other activations are those being "
        "computed, with their gradients."
    )
    return f"## What is held at the peak\n\n{text}\n\n{markdown(head, lines)}\n"


def peers(rows: Sequence[Row], maxtext: Sequence[Row]) -> str:
    """Table of this project's peaks beside MaxText's, with the flags of both."""
    lines, flags = [], []
    for theirs in maxtext:
        name, topology, mesh, per_chip = theirs["key"].split()
        own = (name, topology, mesh, int(per_chip))
        matching = (row for row in rows if (row["name"], row["topology"], row["mesh"], row["sequences"]) == own)
        ours = next(matching, None)
        lines.append([name, topology, mesh, per_chip, peak(ours), peak(theirs)])
        command = "" if ours is None else f"\njaxmodels: python -m train.plan {ours['key']}"
        flags.append(f"# {name}, {topology}, {per_chip} per chip{command}\nMaxText: {' '.join(theirs['flags'])}")
    if not lines:
        return ""
    from bench.maxtext import COMMON

    head = ["model", "slice", "mesh", "sequences per chip", "jaxmodels, HBM in GiB", "MaxText 0.2.5, HBM in GiB"]
    return (
        "## Beside MaxText\n\nMaxText 0.2.5 with jax 0.11.1, compiled ahead of time for the same slices "
        "(`python -m bench.maxtext`): AdamW, float32 parameters, bfloat16 computation, full rematerialization, splash "
        "attention, the vocabulary in 8 tiles.\n\n"
        f"{markdown(head, lines)}\n\n```\n" + "\n\n".join(flags) + f"\n\nMaxText, all steps: {' '.join(COMMON)}\n```\n"
    )


def peak(row: Row | None) -> str:
    if row is None:
        return "not compiled"
    return f"{row['peak'] / GIB:.3f}" if "peak" in row else "refused"
