"""`trace`: errors of every sub-module of a pair, propagated and isolated, forward and backward.

PyTorch runs first, in float64, and the inputs and outputs of every call are kept, on disk beyond a limit. Then the
Flax side runs its `plain` form if it has one, so that every sub-module is called as a module. Each call is compared
when it is made, and repeated with the inputs of PyTorch's call.
"""

import dataclasses

import numpy as np

from parity.compare import limits
from parity.compare.jax_side import JaxSide
from parity.compare.loss import Batch
from parity.compare.torch_side import TorchSide
from parity.locate.backward import Backward
from parity.locate.calls import TorchRun, recorded
from parity.locate.forward import Forward
from parity.locate.store import DEFAULT_LIMIT, store
from parity.locate.tree import Divergence, Part, Trace

FAST_PATH_LIMIT = 1e-3  # in narrower dtypes than float64


def trace(
    reference: TorchSide,
    side: JaxSide,
    batch: Batch,
    *,
    gradients: bool = False,
    memory_limit: int = DEFAULT_LIMIT,
) -> Trace:
    """Trace a Flax model against PyTorch in float64: forward, and with `gradients` backward too.

    Call it with x64 enabled if the side is in float64. In a narrower dtype a sub-module's limit is a multiple of the
    error of PyTorch's own sub-module in that dtype.
    """
    dtype = side.dtype.name
    with store(memory_limit) as kept:
        forward = Forward(TorchRun(reference, batch, kept, gradients=gradients), side)
        with recorded(forward.model, forward.record):
            floats, others = side.values(batch.inputs)
            called = side.call(getattr(forward.model, "plain", forward.model), floats | others)
        outputs = {name: np.asarray(value) for name, value in called.items()}
        trees = {"forward": forward.tree()}
        if gradients:
            backward = Backward(forward, batch, memory_limit)
            trees["backward"] = backward.tree()
        first = first_divergence(trees) or fast_path(side, batch, outputs, backward.gradients if gradients else None)
        if first is not None:
            first = dataclasses.replace(first, dtype=dtype, forward=trees["forward"], backward=trees.get("backward"))
        return Trace(dtype, trees["forward"], trees.get("backward"), first)


def first_divergence(trees: dict[str, Part]) -> Divergence | None:
    """The first culprit; if there is none, the first victim, whose inputs could not be compared."""
    for stage, tree in trees.items():
        victims = sorted((p for p in tree.walk() if p.verdict == "victim"), key=lambda part: part.order)
        for part in (*tree.culprits(), *victims):
            return Divergence(part.path, part.flax_type, part.worst, stage=stage, hint=part.hint)
    return None


def fast_path(
    side: JaxSide, batch: Batch, outputs: dict[str, np.ndarray], gradients: dict[str, np.ndarray] | None
) -> Divergence | None:
    """Divergence of the model's own call from its plain form, whose results are given."""
    limit = limits.FLOAT64_LIMIT if side.dtype == np.float64 else FAST_PATH_LIMIT
    name = type(side.module).__name__
    error = limits.worst(limits.errors(side.outputs(batch.inputs), outputs))[1]
    if error > limit:
        return Divergence("", name, error, fast_path=True)
    if gradients:
        error = limits.worst(limits.errors(side.evaluate(batch)["parameter gradients"], gradients))[1]
        if error > limit:
            return Divergence("", name, error, fast_path=True, stage="backward")
    return None
