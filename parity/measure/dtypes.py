"""`sweep`: compare a pair in every floating dtype; Flax's errors are limited by PyTorch's own in that dtype.

The reference for a dtype is PyTorch in float64 with weights and inputs rounded to that dtype: rounding them is not an
error of the computation. Flax's worst tensor is compared with PyTorch's worst, not tensor by tensor: in 16 bits the
gradient of a single bias depends on where its sum was rounded, which differs between the libraries. Language models are
compared by their distributions too: KL(reference ‖ model), and the most likely tokens.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import numpy as np
import torch
from flax import linen, nnx

from parity.compare import limits
from parity.compare.comparison import Comparison, Settings, Sides
from parity.compare.loss import Batch, Kinds
from parity.locate.store import DEFAULT_LIMIT, check_limit
from parity.locate.trace import trace
from parity.locate.tree import Part
from parity.report.results import Agreement, Check, Row, Sweep
from parity.report.stamp import environment

DTYPES = ("float64", "float32", "bfloat16", "float16")
KINDS = ("output", "parameter gradients")
KL_LIMIT = 1e-7  # of √KL in float64: KL has a rounding error of 1e-16


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
    for dtype in dtypes:
        if dtype == "float64" and not comparison.float64:
            continue
        progress(dtype)
        with comparison.strict_precision(dtype == "float64"):
            sides = comparison.sides(dtype)
            batch, reference = comparison.evaluated(sides.reference, sides.inputs)
            result, own = sides.jax.evaluate(batch), sides.torch.evaluate(batch)
            errors = {kind: worst_errors(kind, result, own, reference) for kind in KINDS if kind in reference}
            checks += [error_check(dtype, kind, *found) for kind, found in errors.items()]
            ours: Agreement | None = None
            theirs: Agreement | None = None
            if comparison.labels is not None and len(reference["output"]) == 1:
                ((key, logits),) = reference["output"].items()
                ours, theirs = (Agreement.of(side["output"][key], logits) for side in (result, own))
                checks.append(distribution_check(dtype, ours, theirs))
            # On an accelerator only whole programs run: no layers are traced.
            parts = traced(sides, batch, memory_limit) if layers and comparison.device.platform == "cpu" else None
            found = {kind: (flax, torch_error) for kind, (_, flax, torch_error) in errors.items()}
            rows.append(Row(dtype, found, ours, theirs, parts))
    stamp = environment(comparison.device, comparison.float64, comparison.seed)
    return Sweep(rows, checks, time.perf_counter() - began, stamp)


def worst_errors(kind: str, result: Kinds, own: Kinds, reference: Kinds) -> tuple[str, float, float]:
    """The name of Flax's worst tensor, its error, and that of PyTorch's worst tensor."""
    # PyTorch has no gradients of untrained parameters; an output that it does not have is an error.
    known = result[kind].keys() if kind == "output" else reference[kind].keys()
    compared = {key: tensor for key, tensor in result[kind].items() if key in known}
    name, error = limits.worst(limits.errors(compared, reference[kind]))
    return name, error, limits.worst(limits.errors(own[kind], reference[kind]))[1]


def error_check(dtype: str, kind: str, name: str, error: float, own: float) -> Check:
    """Flax's worst error; in narrower dtypes as a ratio to PyTorch's."""
    if dtype == "float64":
        return Check(f"sweep: {kind}", dtype, name, error, limits.FLOAT64_LIMIT)
    return Check(f"sweep: {kind}", dtype, name, error / (own + limits.RATIO_FLOOR), limits.RATIO_LIMIT)


def distribution_check(dtype: str, ours: Agreement, theirs: Agreement) -> Check:
    """√KL of Flax; proportional to the error of the logits (KL ≈ half its variance), so it has the same limits."""
    value, own = (float(np.sqrt(agreement.kl_mean)) for agreement in (ours, theirs))
    if dtype == "float64":
        return Check("sweep: √KL", dtype, "logits", value, KL_LIMIT)
    return Check("sweep: √KL", dtype, "logits", value / (own + limits.RATIO_FLOOR), limits.RATIO_LIMIT)


def traced(sides: Sides, batch: Batch, memory_limit: int) -> Part:
    """Errors of every sub-module's outputs."""
    return trace(sides.reference, sides.jax, batch, memory_limit=memory_limit).forward
