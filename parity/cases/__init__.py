"""The project's own parity cases: functions that return a pair of modules and their inputs.

Sizes are prime and unequal, so that a transposed or mixed-up axis cannot pass. A case is named `system.part`.
"""

import dataclasses
import importlib
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np

SYSTEMS = ("rope", "transformer", "synthesizer", "feedback", "retro", "neox")


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two modules and the arguments of `parity.check` for them; steps: number of training steps."""

    torch: Any
    flax: Any
    inputs: Any
    labels: np.ndarray | None = None
    zero_gradients: tuple[str, ...] = ()
    half: tuple[str, ...] = ()
    steps: int = 10


Make = Callable[[np.random.Generator], Pair]
CASES: dict[str, tuple[Make, str]] = {}


def case(name: str, about: str) -> Callable[[Make], Make]:
    """Register a function as the case `name`; `about` is its line in `--list`."""

    def register(make: Make) -> Make:
        CASES[name] = (make, about)
        return make

    return register


def load_cases() -> dict[str, tuple[Make, str]]:
    """All cases by name, in the order of the files. Imports torch."""
    for system in SYSTEMS:
        importlib.import_module(f"parity.cases.{system}")
    return CASES


def matching(name: str, known: Iterable[str]) -> list[str]:
    """Names in `known` that equal a name or belong to the system of that name."""
    return [one for one in known if one == name or one.startswith(f"{name}.")]


def select(names: Sequence[str], known: Collection[str] | None = None, kind: str = "case") -> list[str]:
    """The names in `known` (default: the cases) that match `names`, in its order; all of them if names is empty.

    Raises ValueError for a name that matches nothing.
    """
    known = load_cases() if known is None else known
    unknown = [name for name in names if not matching(name, known)]
    if unknown:
        raise ValueError(f"unknown {kind}: {', '.join(unknown)}; choose from {', '.join(known)}")
    chosen = {one for name in names for one in matching(name, known)}
    return [one for one in known if one in chosen or not names]


def language_model(
    torch_class: type, flax_class: type, rng: np.random.Generator, sequence: int, batch: int, *args: Any, **kwargs: Any
) -> Pair:
    """A sequence-first language model of vocabulary args[0] on random ids [S, B]; labels are the next ids."""
    from flax import nnx

    ids = rng.integers(0, args[0], (sequence + 1, batch))
    flax = nnx.eval_shape(lambda: flax_class(*args, **kwargs, rngs=nnx.Rngs(0)))
    return Pair(torch_class(*args, **kwargs), flax, {"ids": ids[:-1]}, labels=ids[1:])
