"""One case of the project read in every way that is asked for."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from parity.cases import Make, Pair
from parity.compare import jax_side, torch_side
from parity.compare.inputs import Inputs
from parity.compare.jax_side import FlaxSide
from parity.measure.check import check
from parity.measure.dtypes import fast_path, sweep
from parity.measure.invariances import read as read_invariances
from parity.measure.trajectory import trajectory
from parity.report.report import Report, Result
from parity.report.results import Invariances


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to read beside the check itself; trajectories: names of optimizers; fast: what costs and whether twice the
    same, `matmul_precision` None being the device's default."""

    invariances: bool = False
    sweep: bool = False
    trajectories: tuple[str, ...] = ()
    steps: int = 100
    fast: bool = False
    matmul_precision: str | None = None


def examine(
    make: Make,
    name: str,
    wanted: Wanted,
    *,
    device: str | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda stage: None,
) -> Report:
    """The report of a case: its check, and all that is wanted beside it, as far as nothing raises."""
    return Report.gathered(name, readings(make, wanted, device, seed, progress))


def readings(
    make: Make,
    wanted: Wanted,
    device: str | None,
    seed: int,
    progress: Callable[[str], None],
) -> Iterator[Result]:
    """The results that are wanted, one after the other."""
    pair = pair_of(make, seed)
    both = (pair.torch, pair.flax, pair.inputs)
    common: dict[str, Any] = {"labels": pair.labels, "device": device, "seed": seed}
    trained: dict[str, Any] = common | {"zero_gradients": pair.zero_gradients}
    yield check(*both, half=pair.half, steps=pair.steps, progress=progress, **trained)
    if wanted.invariances:
        progress("invariances")
        yield invariances_of(pair, device, seed)
    if wanted.sweep:
        yield sweep(*both, progress=progress, **common)
    for optimizer in wanted.trajectories if trains(pair) else ():
        for precision in ("float64", "float32") if jax.devices(device)[0].platform != "tpu" else ("float32",):
            progress(f"{optimizer}, {precision}")
            yield trajectory(*both, optimizer=optimizer, steps=wanted.steps, precision=precision, **trained)
    if wanted.fast:
        progress("default precision")
        yield fast_path(*both, matmul_precision=wanted.matmul_precision, **common)


def pair_of(make: Make, seed: int) -> Pair:
    torch.manual_seed(seed)
    return make(np.random.default_rng(seed))


def trains(pair: Pair) -> bool:
    return any(parameter.requires_grad for parameter in pair.torch.parameters())


def invariances_of(pair: Pair, device: str | None, seed: int) -> Invariances:
    """The Flax half's, with PyTorch's weights."""
    module, inputs = torch_side.randomized(pair.torch, seed), Inputs.of(pair.inputs)
    chosen = jax.devices(device)[0]
    float64 = chosen.platform != "tpu"
    dtype = torch.float64 if float64 else torch.float32
    with jax_side.strict_precision(float64, chosen):
        state = torch_side.TorchSide(module, dtype, "cpu").module.state_dict()
        side = FlaxSide(pair.flax, state, inputs, jnp.float64 if float64 else jnp.float32)
        return read_invariances(side, pair.labels, seed)
