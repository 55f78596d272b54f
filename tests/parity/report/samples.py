"""Reports without a run: of a pair that agrees, of one that differs, and of one with hostile names."""

import dataclasses

from parity.locate.tree import Divergence, Errors, Part
from parity.report.outcome import Raised
from parity.report.report import Report
from parity.report.results import Check, Reading, Row, Sweep, Trajectory

STAMP = {"date": "2031-02-03 04:05 UTC", "torch": "2.13.0", "jax": "0.10.2", "flax": "0.12.8", "seed": "7"}
# Markup of HTML, rich and terminals, direction marks, a lone surrogate and a noncharacter.
HOSTILE = "<b>&\"'[red]\x00\x1b[31m\x07\r\n\t\x85\u202e\u2028\ud800\uffff</script>"


def errors(value: float) -> Errors:
    return Errors(value, *(value,) * 6, ulps=3.0, snr_db=60.0, size=35, histogram=(0,) * 5 + (35,) + (0,) * 14)


def part(path: str, verdict: str, *children: Part, hint: str = "", order: int = 0) -> Part:
    alone = errors(1e-17 if verdict in ("agrees", "victim") else 1e-3)
    seen = errors(1e-17 if verdict == "agrees" else 1e-3)
    both = (None, None) if verdict == "unmatched" else (seen, alone)
    renamed = path.replace("h.", "blocks.")
    return Part(path, renamed, "Torch", "Flax", "forward", order, 1, *both, 1e-10, verdict, hint, children)


def agreeing(name: str = "mlp") -> Report:
    checks = [
        Check("round trip", "bits", "up.weight", 0.0, 0.0),
        Check("output", "float64", "output", 3e-16, 1e-10),
        Check("output", "float32", "output", 0.53, 4.0),
        Check("two runs: output", "float32", "output", 0.0, float("inf")),
    ]
    return Report(name, checks, 1.5, STAMP)


def differing(name: str = "gpt") -> Report:
    """Two culprits in blocks; notes, a skipped check, a sweep and a trajectory."""
    blocks = (
        part("model.h.0", "encloses", part("model.h.0.ln_1", "culprit", hint="epsilon: Flax has 1e-06", order=1)),
        part("model.h.1", "encloses", part("model.h.1.ln_1", "culprit", hint="epsilon: Flax has 1e-06", order=2)),
        part("model.h.2", "victim"),
        part("model.drop", "unmatched"),
        part("model.wte", "agrees"),
    )
    tree = part("", "encloses", *blocks)
    first = Divergence("model.h.0.ln_1", "LayerNorm", 1e-3, hint="epsilon: Flax has 1e-06", forward=tree)
    checks = [
        *agreeing().checks,
        Check("parameter gradients", "float64", "model.h.0.attn.c_proj.weight", 2e-5, 1e-10),
        Check("parameter gradients", "float32", "model.h.0.attn.c_proj.weight", float("nan"), 4.0),
    ]
    readings = [Reading(kind, "float64", "w", 10.0**-s, 1e-10, s) for s in range(3) for kind in ("loss", "moments")]
    run = Trajectory("adam", "float64", readings, {"torch": [1.0, 0.9, 0.8], "flax": [1.0, 0.9, 0.8]}, 1.0, STAMP)
    sweep = Sweep([Row("float32", {"output": (1e-7, 1e-7)}, None, None, tree)], [], 1.0, STAMP)
    return Report(
        *(name, checks, 2.5, STAMP, first),
        sweep=sweep,
        trajectories=(run,),
        skipped={"cached decoding": "the model has no cache"},
        notes=("float32 inside: model.h.0.table",),
    )


def hostile() -> Report:
    """A report whose every text is `HOSTILE`."""
    tree = dataclasses.replace(part(HOSTILE, "culprit", hint=HOSTILE), torch_type=HOSTILE, flax_type=HOSTILE)
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
