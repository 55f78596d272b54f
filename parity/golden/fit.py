"""Checks of a fixture against the Flax module that it is replayed with, before anything is computed."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from jaxmodels.process.texts import quoted, shortened
from parity.compare.comparison import Comparison
from parity.compare.loss import Kinds
from parity.compare.names import matches
from parity.compare.outputs import correspondence, unmatched
from parity.golden.contents import check_noises, described
from parity.golden.fixture import Fixture
from parity.golden.work import check_work


@contextlib.contextmanager
def naming(stem: str | os.PathLike) -> Iterator[None]:
    """Context that adds the fixture to the message of a ValueError that does not name it; lines are kept."""
    try:
        yield
    except ValueError as error:
        if str(stem) not in str(error):
            error.args = (f"{stem}: {error}",)
        raise


def check_fit(comparison: Comparison, fixture: Fixture) -> list[str]:
    """Notes on how inputs are passed and on what is not compared, after a check of all else against the module.

    Raises ValueError, naming the array, if the module does not take the inputs, if an output has another shape or
    kind of dtype than the module's, if the module computes more than `check_work` allows, and if the noise of what is
    compared is too large for it.
    """
    try:
        returned = comparison.returned or {}
    except Exception as error:
        inputs = ", ".join(f"inputs/{name} {described(a)}" for name, a in fixture.inputs.named().items())
        reason = f"{type(error).__name__}: {shortened(str(error))}"
        raise ValueError(f"the Flax module does not take {shortened(inputs)}: {reason}") from error
    check_work(comparison.flax, comparison.inputs, comparison.channels_last, nbytes=fixture.nbytes)
    outputs = fixture.results["output"]
    pairs = correspondence(outputs, returned)
    for theirs, ours in pairs.items():
        check_output(theirs, outputs[theirs], ours, returned[ours], comparison)
    check_noises(compared(comparison, fixture, pairs), fixture.noises, fixture.own_values)
    notes = [*comparison.inputs.notes, *unmatched(outputs, returned)]
    if fixture.untrained:
        notes.append(f"{len(fixture.untrained)} parameters have no gradients in the fixture: they are not trained")
    return notes


def check_output(theirs: str, expected: Any, ours: str, returned: Any, comparison: Comparison) -> None:
    """Raise ValueError if an output has another shape than the module's, or is of another kind of numbers."""
    shape = list(returned.shape)
    if shape and (matches(theirs, comparison.channels_last) or matches(ours, comparison.channels_last)):
        shape.insert(1, shape.pop())
    kinds = (jnp.inexact, jnp.complexfloating)
    alike = all(jnp.issubdtype(expected.dtype, kind) == jnp.issubdtype(returned.dtype, kind) for kind in kinds)
    if list(expected.shape) != shape or not alike:
        raise ValueError(
            f"{quoted(f'output/{theirs}')} is {described(expected)}; the Flax module's {quoted(ours)} is "
            f"{returned.dtype} {shape}"
        )


def compared(comparison: Comparison, fixture: Fixture, outputs: Mapping[str, str]) -> Kinds:
    """The results that have a counterpart. Others say nothing about the size of noise."""
    without = comparison.untrained
    return {
        kind: {
            name: tensor
            for name, tensor in tensors.items()
            if (name in outputs if kind == "output" else kind != "parameter gradients" or name not in without)
        }
        for kind, tensors in fixture.results.items()
    }
