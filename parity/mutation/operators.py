"""Porting mistakes that can be planted in any sub-module of an NNX model: in weights, constants and calls."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from parity.locate.calls import calls_replaced

Change = Callable[[nnx.Module], Callable[[], None] | None]
Call = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Operator:
    """A mistake. `change` returns a function that makes it in a Flax sub-module; None if it does not apply."""

    name: str
    about: str
    change: Change


OPERATORS: dict[str, Operator] = {}
CALLED: dict[str, Call] = {}  # by operator: (original call, args, kwargs) -> wrong output


def operator(name: str, about: str) -> Callable[[Change], Change]:
    """Register a change as an operator."""

    def register(change: Change) -> Change:
        OPERATORS[name] = Operator(name, about, change)
        return change

    return register


# Mistakes in the weights.


def of_array(names: Sequence[str], function: Callable[[jax.Array], jax.Array | None]) -> Change:
    """A change to the first of the named arrays that a sub-module has and the function applies to."""

    def change(module: nnx.Module) -> Callable[[], None] | None:
        for name in names:
            variable = vars(module).get(name)
            if not isinstance(variable, nnx.Param) or variable.get_value() is None:  # an nnx layer without bias
                continue
            if jax.eval_shape(function, variable[...]) is not None:
                return lambda: variable.set_value(function(variable[...]))
        return None

    return change


KERNELS = ("kernel", "embedding")
operator("transposed kernel", "a square kernel is transposed")(
    of_array(["kernel"], lambda k: k.swapaxes(-1, -2) if k.ndim > 1 and k.shape[-1] == k.shape[-2] else None)
)
operator("missing bias", "a bias is not added")(of_array(["bias"], jnp.zeros_like))
operator("bias added twice", "a bias is added twice, as if by each of two ranks")(of_array(["bias"], lambda b: 2 * b))
operator("missing scale", "a norm's scale is replaced by ones")(of_array(["scale"], jnp.ones_like))
operator("scale plus one", "a norm multiplies by 1 + scale")(of_array(["scale"], lambda s: 1 + s))
operator("swapped outputs", "the first two output features are swapped")(
    of_array(["kernel"], lambda k: k.at[..., 0].set(k[..., 1]).at[..., 1].set(k[..., 0]) if k.shape[-1] > 1 else None)
)
operator("features before heads", "the output features are laid out [d_k, heads] instead of [heads, d_k]")(
    of_array(["kernel"], lambda k: mixed(k) if divisor(k.shape[-1]) else None)
)
operator("rows off by one", "rows of an embedding or table are shifted by one")(
    of_array(["embedding", "key_pos_embeddings", "key_pos_bias"], lambda e: jnp.roll(e, 1, axis=0))
)
operator("one weight changed", "one weight is changed by a thousandth of the largest magnitude")(
    of_array([*KERNELS, "scale", "weights"], lambda k: k.at[(0,) * k.ndim].add(1e-3 * jnp.abs(k).max()))
)
operator("weights in bfloat16", "weights are rounded to bfloat16")(
    of_array(KERNELS, lambda k: k.astype(jnp.bfloat16).astype(k.dtype))
)


def divisor(n: int) -> int:
    """The smallest divisor of n between 1 and n; 0 if there is none."""
    return next((d for d in range(2, n) if n % d == 0), 0)


def mixed(kernel: jax.Array) -> jax.Array:
    """The kernel with its output features [d, n / d] transposed."""
    d = divisor(kernel.shape[-1])
    return kernel.reshape(*kernel.shape[:-1], d, -1).swapaxes(-1, -2).reshape(kernel.shape)


# Mistakes in the constants.


def of_attribute(names: Sequence[str], function: Callable[[float], float]) -> Change:
    """A change to the first of the named numbers that a sub-module has."""

    def change(module: nnx.Module) -> Callable[[], None] | None:
        for name in names:
            value = vars(module).get(name)
            if isinstance(value, int | float) and not isinstance(value, bool) and value:
                return lambda: setattr(module, name, function(value))
        return None

    return change


operator("wrong epsilon", "a norm's epsilon is multiplied by ten")(of_attribute(["epsilon"], lambda e: 10 * e))
operator("wrong base", "the rotary angles' base is doubled")(of_attribute(["base", "rope_base"], lambda b: 2 * b))
operator("wrong scale", "scores are scaled by 1/d_k instead of 1/√d_k")(of_attribute(["scale"], lambda s: s * s))


# Mistakes in the call. The operator's name is an attribute of the sub-module, which survives jit, scan and merge.


def when_called(name: str, about: str) -> Callable[[Call], Call]:
    """Register a function (original call, args, kwargs) -> wrong output as an operator."""

    def register(function: Call) -> Call:
        def change(module: nnx.Module) -> Callable[[], None] | None:
            return lambda: setattr(module, "planted", name)

        OPERATORS[name] = Operator(name, about, change)
        CALLED[name] = function
        return function

    return register


def floats(tree: Any, function: Callable[[jax.Array], jax.Array]) -> Any:
    """Apply a function to the floating arrays of a tree."""

    def one(leaf: Any) -> Any:
        return function(leaf) if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(one, tree)


@when_called("factor", "the output is multiplied by 1.001")
def factor(call: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
    return floats(call(*args, **kwargs), lambda y: 1.001 * y)


@when_called("features rolled", "the output's features are shifted cyclically by one")
def features_rolled(call: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
    return floats(call(*args, **kwargs), lambda y: jnp.roll(y, 1, axis=-1))


@when_called("positions rolled", "the output is shifted cyclically by one position")
def positions_rolled(call: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
    def late(y: jax.Array) -> jax.Array:
        return jnp.roll(y, 1, axis=int(np.argmax(y.shape[:-1]))) if y.ndim > 1 else y

    return floats(call(*args, **kwargs), late)


@when_called("input in float32", "the inputs are rounded to float32")
def input_in_float32(call: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
    return call(*floats(args, lambda x: x.astype(jnp.float32).astype(x.dtype)), **kwargs)


@when_called("input in bfloat16", "the inputs are rounded to bfloat16")
def input_in_bfloat16(call: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
    return call(*floats(args, lambda x: x.astype(jnp.bfloat16).astype(x.dtype)), **kwargs)


@when_called("no gradient", "the output is unchanged, but its gradient is stopped")
def no_gradient(call: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
    return floats(call(*args, **kwargs), jax.lax.stop_gradient)


@when_called("wrong gradient", "the output is unchanged, but its gradient is multiplied by 1.01")
def wrong_gradient(call: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
    return floats(call(*args, **kwargs), lambda y: 1.01 * y - jax.lax.stop_gradient(0.01 * y))


@when_called("no residual", "the input is subtracted from the output")
def no_residual(call: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
    def without(y: jax.Array) -> jax.Array:
        x = next((a for a in jax.tree.leaves((args, kwargs)) if isinstance(a, jax.Array) and a.shape == y.shape), None)
        return y if x is None else y - x

    return floats(call(*args, **kwargs), without)


@when_called("skipped", "the sub-module returns its input")
def skipped(call: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
    y = call(*args, **kwargs)
    x = next((a for a in jax.tree.leaves((args, kwargs)) if isinstance(a, jax.Array)), None)
    return x if isinstance(y, jax.Array) and x is not None and (x.shape, x.dtype) == (y.shape, y.dtype) else y


@when_called("arguments swapped", "the first two array arguments are swapped")
def arguments_swapped(call: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
    values = [*args, *kwargs.values()]
    if len(values) < 2 or not all(isinstance(v, jax.Array) for v in values[:2]) or values[0].shape != values[1].shape:
        return call(*args, **kwargs)
    values[:2] = values[1::-1]
    return call(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))


@when_called("mask ignored", "masks are ignored: every position is visible")
def mask_ignored(call: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
    def seen(leaf: Any) -> Any:
        return jnp.ones_like(leaf) if isinstance(leaf, jax.Array) and leaf.dtype == bool else leaf

    return call(*jax.tree.map(seen, args), **jax.tree.map(seen, kwargs))


@contextlib.contextmanager
def planted_calls(model: nnx.Module) -> Iterator[None]:
    """Within the block, calls of a sub-module with an operator's name as attribute `planted` make that mistake."""
    active: list[Any] = []

    def wrapped(original: Call) -> Call:
        @functools.wraps(original)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            mistake = CALLED.get(getattr(self, "planted", ""))
            if mistake is None or (active and active[-1] is self):
                return original(self, *args, **kwargs)
            active.append(self)
            try:
                return mistake(functools.partial(original, self), args, kwargs)
            finally:
                active.pop()

        return call

    with calls_replaced(model, wrapped):
        yield
