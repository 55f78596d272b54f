"""Reports without a run: of a pair that agrees, of one that differs, and of one with hostile names."""

import dataclasses
from typing import Any

from parity.locate.tree import Divergence, Errors, Part
from parity.report.outcome import Raised
from parity.report.report import Report
from parity.report.results import Check, Reading, Row, Sweep, Trajectory

STAMP = {"date": "2031-02-03 04:05 UTC", "torch": "2.13.0", "jax": "0.10.2", "flax": "0.12.8", "seed": "7"}
# Markup of HTML, rich and terminals, direction marks, a lone surrogate and a noncharacter.
HOSTILE = "<b>&\"'[red]\x00\x1b[31m\x07\r\n\t\x85\u202e\u2028\ud800\uffff</script>"


def errors(value: float) -> Errors:
    counts = (0,) * 5 + (35,) + (0,) * 14
    return Errors(value, *(value,) * 6, ulps=3.0, snr_db=60.0, size=35, histogram=counts, noise=value * 1e16)


def part(path: str, verdict: str, *children: Part, order: int = 0, **others: Any) -> Part:
    """A part whose sizes fit its verdict."""
    alone = errors(1e-17 if verdict in ("agrees", "victim") else 1e-3)
    seen = errors(1e-17 if verdict == "agrees" else 1e-3)
    both = (None, None) if verdict in ("unmatched", "not compared") else (seen, alone)
    renamed = path.replace("h.", "blocks.")
    found = Part(path, renamed, "Torch", "Flax", "forward", order, 1, *both, limit=32.0, verdict=verdict)
    return dataclasses.replace(found, children=children, **others)


def agreeing(name: str = "mlp") -> Report:
    checks = [
        Check("round trip", "bits", "up.weight", 0.0, 0.0),
        Check("output", "float64", "output", 0.3, 32.0),
        Check("output", "float32", "output", 0.53, 4.0, own=0.8),
        Check("two runs: output", "float32", "output", 0.0, float("inf")),
    ]
    return Report(name, checks, 1.5, STAMP)


def differing(name: str = "gpt") -> Report:
    """Three culprits in blocks, of which one matters less; notes, a skipped check, a sweep and a trajectory."""
    hint = "epsilon: Flax has 1e-06"
    norms = [
        part(f"model.h.{i}.ln_1", "culprit", hint=hint, order=i, share=share)
        for i, share in enumerate((0.9, 0.2, 0.01))
    ]
    blocks = (
        *(part(f"model.h.{i}", "encloses", norm) for i, norm in enumerate(norms)),
        part("model.h.3", "victim"),
        part("model.drop", "unmatched"),
        part("model.wpe", "not compared", reason="its output has another shape"),
        part("model.wte", "agrees"),
    )
    tree = part("", "encloses", *blocks)
    first = Divergence("model.h.0.ln_1", "LayerNorm", 1e-3, hint=hint, forward=tree)
    checks = [
        *agreeing().checks,
        Check("parameter gradients", "float64", "model.h.0.attn.c_proj.weight", 2e11, 32.0),
        Check("parameter gradients", "float32", "model.h.0.attn.c_proj.weight", float("nan"), 4.0),
    ]
    readings = [Reading(kind, "float64", "w", 10.0**s, 32.0, s) for s in range(3) for kind in ("loss", "moments")]
    run = Trajectory("adam", "float64", readings, {"torch": [1.0, 0.9, 0.8], "flax": [1.0, 0.9, 0.8]}, 1.0, STAMP)
    sweep = Sweep([Row("float32", {"output": (0.9, 0.7)}, None, None, tree)], [], 1.0, STAMP)
    return Report(
        *(name, checks, 2.5, STAMP, first),
        sweep=sweep,
        trajectories=(run,),
        skipped={"cached decoding": "the model has no cache"},
        notes=("float32 inside: model.h.0.table",),
    )


def hostile() -> Report:
    """A report whose every text is `HOSTILE`."""
    tree = part(HOSTILE, "culprit", hint=HOSTILE, reason=HOSTILE, torch_type=HOSTILE, flax_type=HOSTILE)
    return Report(
        HOSTILE,
        [Check(HOSTILE, "float32", HOSTILE, 5.0, 4.0), Check("output", "float32", HOSTILE, 1.0, 4.0)],
        1.0,
        STAMP | {HOSTILE: HOSTILE},
        Divergence(HOSTILE, HOSTILE, 1e-3, hint=HOSTILE, forward=tree),
        sweep=Sweep([Row("float32", {HOSTILE: (1.0, 1.0)}, None, None, tree)], [], 1.0, STAMP),
        skipped={HOSTILE: HOSTILE},
        error=Raised("ValueError", HOSTILE, HOSTILE),
        notes=(HOSTILE,),
    )
