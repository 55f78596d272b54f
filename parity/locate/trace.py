"""`trace`: errors of every sub-module of a pair, propagated and isolated, forward and backward.

PyTorch runs first. The inputs and outputs of every call are kept, on disk beyond a limit, and their rounding noise is
measured. Then the Flax side runs its `plain` form if it has one, so that every sub-module is called as a module. Calls
that are off are repeated with the inputs of PyTorch's call, and `causes` tells culprits from victims.
"""

import dataclasses

import numpy as np

from parity.compare.loss import Batch, Kinds
from parity.compare.noise import LIMIT, ULPS
from parity.compare.sides.jax_side import JaxSide
from parity.compare.sides.torch_side import TorchSide
from parity.compare.store import DEFAULT_LIMIT, store
from parity.locate.backward import Backward
from parity.locate.causes import Causes
from parity.locate.forward import Forward
from parity.locate.torch_calls import TorchRun
from parity.locate.tree import Divergence, Part, Trace


def trace(
    reference: TorchSide,
    side: JaxSide,
    batch: Batch,
    *,
    gradients: bool = False,
    outputs_agree: bool = False,
    memory_limit: int = DEFAULT_LIMIT,
) -> Trace:
    """Trace a Flax model against PyTorch in float64: forward, and with `gradients` backward too.

    outputs_agree: the outputs pass, although constants in float32 may move them: look at the gradients first.
    Call it with x64 enabled if the side is in float64. In a narrower dtype the noise is that predicted for it, and a
    sub-module may have twice the error of PyTorch's own in that dtype.
    """
    dtype = side.dtype.name
    with store(memory_limit) as kept:
        run = TorchRun(reference, batch, kept, gradients=gradients, ulp=ULPS[dtype])
        forward = Forward(run, side, kept)
        trees = {"forward": Causes(forward).tree()}
        found: dict[str, np.ndarray] = {}
        if gradients:
            backward = Backward(forward, batch, memory_limit)
            trees["backward"], found = backward.tree(), backward.gradients
        order = sorted(trees) if outputs_agree else list(trees)  # "backward" before "forward"
        first = first_culprit({stage: trees[stage] for stage in order})
        if first is None:
            plain = {"output": forward.flax.outputs} | ({"parameter gradients": found} if gradients else {})
            first = fast_path(reference, side, batch, plain) or first_victim(trees)
        if first is not None:
            first = dataclasses.replace(first, dtype=dtype, forward=trees["forward"], backward=trees.get("backward"))
        return Trace(dtype, trees["forward"], trees.get("backward"), first)


def first_culprit(trees: dict[str, Part]) -> Divergence | None:
    """The first culprit that explains the error."""
    for stage, tree in trees.items():
        for part in tree.culprits():
            if part.share != 0.0:
                return Divergence(part.path, part.flax_type, part.worst, stage=stage, hint=part.hint)
    return None


def first_victim(trees: dict[str, Part]) -> Divergence | None:
    """The first part that is off, whose inputs could not be compared; None if the whole model is not off."""
    for stage, tree in trees.items():
        victims = [part for part in tree.walk() if part.verdict == "victim"]
        if victims and tree.verdict != "agrees":
            part = min(victims, key=lambda part: part.order)
            return Divergence(part.path, part.flax_type, part.worst, stage=stage, hint=part.hint or part.reason)
    return None


def fast_path(reference: TorchSide, side: JaxSide, batch: Batch, plain: Kinds) -> Divergence | None:
    """Divergence of the model's own call from its plain form, whose results are given, in units of PyTorch's noise."""
    name, ulp = type(side.module).__name__, ULPS[side.dtype.name]
    both = "parameter gradients" in plain
    truth = reference.evaluate(batch) if both else {"output": reference.outputs(batch.inputs)}
    noises = reference.noises(batch, truth, ulp, 0)
    fused = side.evaluate(batch) if both else {"output": side.outputs(batch.inputs)}
    for kind, stage in (("output", "forward"), ("parameter gradients", "backward")):
        ours, theirs = fused.get(kind, {}), plain.get(kind, {})
        known = ours.keys() & theirs.keys() & truth.get(kind, {}).keys()
        values = {key: noises[kind][key].error(ours[key], theirs[key]) for key in known}
        if values and max(values.values()) > LIMIT:
            key = max(values, key=values.__getitem__)
            scale = float(np.abs(theirs[key]).max(initial=0.0)) or 1.0
            error = float(np.abs(ours[key] - theirs[key]).max()) / scale
            return Divergence("", name, error, fast_path=True, stage=stage)
    return None
