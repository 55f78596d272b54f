"""Sizes of stored tensors, with which those of a configuration are compared before a model of it is built.

A configuration of unknown origin may name a billion layers: their modules alone, without any values, would fill the
memory.
"""

import contextlib
import contextvars
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
from flax import nnx

from jaxmodels.weights.names import Path, flat_arrays, stacked_at

Model = TypeVar("Model", bound=nnx.Module)

LARGER = 4  # times what is stored: smaller differences are listed by tensor when the weights are read
SPARE = 200  # keys that a model may draw beyond those of its arrays

_replacing = threading.RLock()  # of the one method that all streams have
_left: contextvars.ContextVar[list[int] | None] = contextvars.ContextVar("left", default=None)


class TooLarge(ValueError):
    """A configuration is larger than the tensors that are stored."""


class Stored(NamedTuple):
    """Numbers of tensors, of which a stacked array holds one for each layer, and of their elements."""

    tensors: int
    elements: int

    @classmethod
    def of(cls, arrays: Mapping[str, Any]) -> "Stored":
        """Numbers of arrays, or other objects with a shape, by PyTorch's or Flax's names."""
        return cls.of_model({tuple(map(word, str(name).split("."))): array for name, array in arrays.items()})

    @classmethod
    def of_model(cls, arrays: Mapping[Path, Any]) -> "Stored":
        """Numbers of a model's arrays by path."""
        sizes = {path: math.prod(array.shape) for path, array in arrays.items()}
        layers = [arrays[path].shape[0] if stacked_at(path) is not None and n else 1 for path, n in sizes.items()]
        return cls(sum(layers), sum(sizes.values()))

    def check(self, wanted: "Stored", where: str) -> None:
        """Raises TooLarge, beginning with `where`, if a model has far more tensors or elements than are stored."""
        if wanted.tensors > LARGER * self.tensors + SPARE or wanted.elements > LARGER * self.elements:
            raise TooLarge(
                f"{where} describes a model of {short(wanted.elements)} parameters in {short(wanted.tensors)} tensors; "
                f"stored are {short(self.elements)} in {short(self.tensors)}"
            )


def word(text: str) -> str | int:
    """Word of a name as in a path: the number of a layer is an integer."""
    return int(text) if text.isdecimal() and len(text) < 10 else text


def short(number: int) -> str:
    """Decimal number, of many digits only the magnitude."""
    return f"{number:,}" if number < 10**18 else "more than 10^18"


class Stream(nnx.RngStream):
    """Stream of equal keys, for models without values; it ends after a number of them in a block of `ending_after`.

    JAX takes longer to trace each further key that is derived from the last one.
    """

    def __call__(self) -> jax.Array:
        return equal_key()


def equal_key() -> jax.Array:
    """The next key of a stream of equal ones."""
    left = _left.get()
    if left is not None:
        left[0] -= 1
        if left[0] < 0:
            raise TooLarge
    return jax.random.key(0)


@contextlib.contextmanager
def ending_after(keys: int) -> Iterator[None]:
    """Block in which streams raise TooLarge after so many keys, also those that a model makes of a seed of its own."""
    with _replacing:
        original, token = nnx.RngStream.__call__, _left.set([keys])

        def drawn(stream: nnx.RngStream) -> jax.Array:
            return original(stream) if _left.get() is None else equal_key()  # None in other threads

        setattr(nnx.RngStream, "__call__", drawn)  # noqa: B010 (unknown to type checkers)
        try:
            yield
        finally:
            setattr(nnx.RngStream, "__call__", original)  # noqa: B010
            _left.reset(token)


def shapes_of(make: Callable[[nnx.Rngs], Model]) -> Model:
    """Abstract model of a function of random keys: its shapes and dtypes, as by `nnx.eval_shape`."""

    def made() -> Model:
        rngs = nnx.Rngs(0)
        setattr(rngs, "default", Stream(jax.random.key(0), tag="default"))  # noqa: B010 (unknown to type checkers)
        return make(rngs)

    model = nnx.eval_shape(made)
    if nnx.to_flat_state(nnx.state(model, nnx.RngState)):  # a module that keeps its stream
        return nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    return model


def limited(make: Callable[[nnx.Rngs], Model], stored: Stored, where: str) -> Model:
    """Abstract model of a function of random keys, or of a seed of its own. Values are not made.

    Raises TooLarge, beginning with `where`, as soon as it has drawn far more keys than the stored tensors need.
    """
    most = LARGER * stored.tensors + SPARE
    try:
        with ending_after(most):
            return shapes_of(make)
    except TooLarge:
        raise TooLarge(
            f"{where} describes a model of more than {most:,} tensors; stored are {stored.tensors:,}"
        ) from None


def abstract(make: Callable[[nnx.Rngs], Model], stored: Stored, where: str) -> Model:
    """Model as by `limited`; raises TooLarge, beginning with `where`, also if its arrays are far larger."""
    model = limited(make, stored, where)
    stored.check(Stored.of_model(flat_arrays(model)), where)
    return model
