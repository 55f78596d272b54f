"""`sweep`: compare a pair in every floating dtype, as the modules run, in units of the noise of that dtype.

The reference for a dtype is PyTorch in float64 with weights and inputs rounded to that dtype: rounding them is not an
error of the computation. A tensor fails beyond the noise that is predicted for the dtype and beyond twice PyTorch's own
value. A `dtype` field of float32 in the Flax module is set to the dtype. Language models are compared by their
distributions too: KL(reference ‖ model), and the most likely tokens.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import numpy as np
import torch
from flax import linen, nnx

from parity.compare.arguments import modules
from parity.compare.comparison import Comparison, Settings, Sides
from parity.compare.loss import Batch
from parity.compare.noise import ULPS
from parity.compare.store import DEFAULT_LIMIT, check_limit
from parity.locate.trace import trace
from parity.locate.tree import Part
from parity.measure.explain import explained_alone
from parity.measure.reference import Reference, judged, judged_narrow
from parity.report.results import Agreement, Check, Row, Sweep
from parity.report.stamp import environment

DTYPES = ("float64", "float32", "bfloat16", "float16")
KINDS = ("output", "parameter gradients")


def sweep(
    torch_module: torch.nn.Module,
    flax_module: nnx.Module | linen.Module,
    inputs: Any,
    *,
    dtypes: Sequence[str] = DTYPES,
    layers: bool = True,
    memory_limit: int = DEFAULT_LIMIT,
    progress: Callable[[str], None] = lambda dtype: None,
    **settings: Unpack[Settings],
) -> Sweep:
    """Outputs and parameter gradients of both sides in every dtype, each against the float64 reference of that dtype.

    layers: also trace every sub-module in each dtype (on a CPU). With labels, a single output is read as logits over
    the whole vocabulary. The settings are those of `parity.check`. Raises ValueError for a dtype that is not in
    DTYPES and for a negative memory_limit.
    """
    check_limit(memory_limit)
    if set(dtypes) - set(DTYPES):
        raise ValueError(f"dtypes={list(dtypes)} must be among {', '.join(DTYPES)}")
    modules(torch_module, flax_module, both=True)
    comparison = Comparison.of(torch_module, flax_module, inputs, **settings)
    return read_sweep(comparison, dtypes=dtypes, layers=layers, memory_limit=memory_limit, progress=progress)


def read_sweep(
    comparison: Comparison,
    *,
    dtypes: Sequence[str] = DTYPES,
    layers: bool = True,
    memory_limit: int = DEFAULT_LIMIT,
    progress: Callable[[str], None] = lambda dtype: None,
) -> Sweep:
    """`sweep` on a resolved comparison."""
    began = time.perf_counter()
    rows: list[Row] = []
    checks: list[Check] = []
    notes: list[str] = []
    for dtype in dtypes:
        if dtype == "float64" and not comparison.float64:
            continue
        progress(dtype)
        with comparison.strict_precision(dtype == "float64"):
            sides = comparison.sides(dtype)
            batch, truth = comparison.evaluated(sides.reference, sides.inputs)
            noises = sides.reference.noises(batch, truth, ULPS[dtype], comparison.seed)
            reference = Reference(comparison, batch, truth, noises, dtype)
            result, own = sides.jax.evaluate(batch), sides.torch.evaluate(batch)
            values, of_torch = reference.values(result, dtype), reference.values(own, dtype)
            kinds = [kind for kind in KINDS if kind in values]
            if dtype == "float64":
                why = explained_alone(reference, sides.reference, sides.jax, result)
                notes += why.notes
                found = {kind: judged(f"sweep: {kind}", dtype, values[kind], why.limits[kind]) for kind in kinds}
            else:
                found = {kind: judged_narrow(f"sweep: {kind}", dtype, values[kind], of_torch[kind]) for kind in kinds}
            checks += found.values()
            ours: Agreement | None = None
            theirs: Agreement | None = None
            if comparison.labels is not None and len(truth["output"]) == 1:
                ((key, logits),) = truth["output"].items()
                outputs = reference.compared(result, "output"), own["output"]
                ours, theirs = (Agreement.of(side[key], logits) for side in outputs)
                if dtype != "float64":  # there √KL is below its own rounding, 1e-8
                    unit = reference.noise("output", dtype)[key].unit
                    root, own_root = (float(np.sqrt(agreement.kl_mean)) / unit for agreement in (ours, theirs))
                    checks.append(judged_narrow("sweep: √KL", dtype, {"logits": root}, {"logits": own_root}))
            # On an accelerator only whole programs run: no layers are traced.
            parts = traced(sides, batch, memory_limit) if layers and comparison.device.platform == "cpu" else None
            worst = {kind: (check.value, max(of_torch[kind].values())) for kind, check in found.items()}
            rows.append(Row(dtype, worst, ours, theirs, parts))
    stamp = environment(comparison.device, comparison.float64, comparison.seed)
    return Sweep(rows, checks, time.perf_counter() - began, stamp, tuple(notes))


def traced(sides: Sides, batch: Batch, memory_limit: int) -> Part:
    """Errors of every sub-module's outputs."""
    return trace(sides.reference, sides.jax, batch, memory_limit=memory_limit).forward
