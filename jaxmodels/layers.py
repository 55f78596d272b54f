"""Layers shared by several systems: PyTorch's defaults for Linear, LayerNorm, Embedding and Dropout; feed-forward.

Axes: D = d_model = H·d_k features, H heads. Leading axes are free.

Flax's defaults differ from PyTorch's in each of these: the distributions of initial weights, LayerNorm's epsilon
(1e-6 against 1e-5) and its variance (E[x²] - E[x]², which loses precision if the mean is large).
"""

import contextlib
import contextvars
import functools
import inspect
import math
import numbers
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxmodels.process.texts import quoted

# Sharding rules of these modules; see `jaxmodels.sharding`. The vocabulary axis is never divided: a vocabulary of
# characters has any size, for example 65.
FEED_FORWARD_RULES = [
    (r"layer1\.kernel", P("fsdp", "tensor")),
    (r"layer1\.bias", P("tensor")),
    (r"layer2\.kernel", P("tensor", "fsdp")),
    (r"layer2\.bias", P()),
]
SMALL_RULES = [(r"norm\w*\.(scale|bias)", P()), (r"src_embed\.embedding", P(None, "fsdp"))]

Call = TypeVar("Call", bound=Callable[..., Any])

_placement: contextvars.ContextVar[Callable[[jax.Array, str], jax.Array] | None]
_placement = contextvars.ContextVar("placement", default=None)
_remat: contextvars.ContextVar[Callable[[Callable], Callable] | None] = contextvars.ContextVar("remat", default=None)
_lookup: contextvars.ContextVar[Callable[[jax.Array, jax.Array], jax.Array] | None]
_lookup = contextvars.ContextVar("lookup", default=None)
_product: contextvars.ContextVar[Callable[[jax.Array, jax.Array], jax.Array] | None]
_product = contextvars.ContextVar("product", default=None)
_cpu: contextvars.ContextVar[bool] = contextvars.ContextVar("cpu", default=False)

PRODUCT = "product"  # name of `RowLinear`'s products for policies of jax.checkpoint
UNROLLED = 12  # layers; the time to compile grows with them


@contextlib.contextmanager
def hooks(
    *,
    placement: Callable[[jax.Array, str], jax.Array] | None = None,
    remat: Callable[[Callable], Callable] | None = None,
    lookup: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    product: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    cpu: bool = False,
) -> Iterator[None]:
    """Set the functions that `constrain` and `rematerialized` apply in models traced inside the block.

    lookup: replaces `rows_of` in `Embed`, for tables that are divided over a mesh. product: multiplies rows by weights
    in `RowLinear`. cpu: write the same computation as one CPU computes it fastest, see `unrolls`. jit caches what it
    traced: jit a new function for each setting.
    """
    tokens = _placement.set(placement), _remat.set(remat), _lookup.set(lookup)
    on_cpu, multiply = _cpu.set(cpu), _product.set(product)
    try:
        yield
    finally:
        _placement.reset(tokens[0])
        _remat.reset(tokens[1])
        _lookup.reset(tokens[2])
        _cpu.reset(on_cpu)
        _product.reset(multiply)


def constrain(x: jax.Array, name: str) -> jax.Array:
    """Place an activation on the mesh by the letters of its axes, such as "SBD"; the identity without a mesh."""
    place = _placement.get()
    return x if place is None else place(x, name)


def rematerialized(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a layer's call in the current `remat` hook, e.g. `jax.checkpoint`; see `hooks` and `read_only`."""
    wrap = _remat.get()
    return function if wrap is None else wrap(read_only(function))


def unrolls(n_layers: int) -> bool:
    """True if so many stacked layers are to be compiled one by one, which is faster on a CPU.

    Not if they are rematerialized: outside a loop, XLA would merge the recomputed operations with the first ones.
    """
    return _cpu.get() and _remat.get() is None and n_layers <= UNROLLED


def in_turn(
    first: Callable[[jax.Array], jax.Array], second: Callable[[jax.Array], jax.Array], x: jax.Array, name: str
) -> jax.Array:
    """first(x) + second(x). Where layers are rematerialized, the second's derivative is computed before the first is.

    XLA would otherwise compute both again at once, and hold what both need. name: the axes as in `constrain`, by which
    the derivative by the result is placed once for the products of both: "BSG" gathers the features.
    """
    wrap = _remat.get()
    if wrap is not jax.checkpoint:
        return first(x) + second(x)
    found, x = _derivative_after(wrap(first)(x), x)
    return _derivative_placed(found + second(x), name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _derivative_placed(x: jax.Array, name: str) -> jax.Array:
    """The identity; its cotangent is placed on the mesh."""
    return x


_derivative_placed.defvjp(lambda x, name: (x, None), lambda name, _, cotangent: (constrain(cotangent, name),))


@jax.custom_vjp
def _derivative_after(result: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The identity; the cotangent of the result waits for that of x."""
    return result, x


_derivative_after.defvjp(lambda *arrays: (arrays, None), lambda _, cotangents: jax.lax.optimization_barrier(cotangents))


def check_sizes(**sizes: int) -> None:
    """Raises ValueError, naming the argument, if a size is no integer or below 1."""
    for name, size in sizes.items():
        if not isinstance(size, numbers.Integral):
            raise ValueError(f"{name}={quoted(size)} must be an integer")
        if size < 1 or isinstance(size, bool):
            raise ValueError(f"{name}={size} must be at least 1")


def check_ids(ids: jax.Array, axes: str = "[S, B]") -> None:
    """Raises ValueError if ids are not a non-empty matrix of integers."""
    if ids.ndim != 2 or 0 in ids.shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids must be non-empty integers {axes}, got {ids.dtype}{list(ids.shape)}")


def read_only(function: Call) -> Call:
    """Wrap a function that calls modules where a change of their arrays would be lost, as inside a scan.

    Raises ValueError, naming the sub-module, if an array of a module among the arguments changes in the call: the
    statistics of a BatchNorm in training mode, the counter of a stream of random keys.
    """

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        before = [(module, arrays_of(module)) for module in args if isinstance(module, nnx.Module)]
        result = function(*args, **kwargs)
        for module, arrays in before:
            changed = [path for path, a in arrays_of(module).items() if arrays.get(path, a) is not a]
            if changed:
                *owner, name = map(str, changed[0])
                raise ValueError(
                    f"{'.'.join(owner) or type(module).__name__} changes its {name} in the call; it must only read its "
                    "arrays, as the layers are scanned or rematerialized"
                )
        return result

    return cast(Call, checked)


def arrays_of(module: nnx.Module) -> dict[tuple[Any, ...], Any]:
    """All arrays of a module by path, those of random streams included."""
    leaves: Any = nnx.to_flat_state(nnx.state(module))
    return {path: leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf for path, leaf in leaves}


def float_dtype(module: nnx.Module) -> Any:
    """The widest dtype of a module's floating arrays."""
    return jnp.result_type(*(a for a in arrays_of(module).values() if jnp.issubdtype(a.dtype, jnp.floating)))


def check_decodes(model: nnx.Module, pattern: str, methods: Sequence[str] = ("decode",)) -> None:
    """Raises ValueError, naming the sub-module, if cached decoding would not compute what the call does.

    pattern: of the dotted paths of sub-modules that must have these methods. A subclass that overrides `__call__` must
    override `decode` too, or the cached path would leave out what it does.
    """
    for words, module in nnx.iter_modules(model):
        path, kind = ".".join(map(str, words)), type(module)
        missing = [name for name in methods if not callable(getattr(module, name, None))]
        if missing and re.fullmatch(pattern, path) and not isinstance(module, nnx.List):
            raise ValueError(f"{path} is a {kind.__name__}; cached decoding needs its method {missing[0]}")
        if path and callable(getattr(kind, "decode", None)):
            call, decode = definer(kind, "__call__"), definer(kind, "decode")
            if not issubclass(decode, call):
                raise ValueError(
                    f"{path} is a {kind.__name__} with a `__call__` of {call.__name__} and the `decode` of "
                    f"{decode.__name__}; cached decoding needs both to be overridden"
                )


def definer(kind: type, name: str) -> type:
    """The class from which a class inherits a method; wrappers made by `functools.wraps` do not count."""
    method = inspect.unwrap(getattr(kind, name))
    return next(c for c in reversed(kind.__mro__) if inspect.unwrap(getattr(c, name, check_decodes)) is method)


def uniform(fan_in: int) -> Callable[..., jax.Array]:
    """PyTorch's initializer of a Linear's weight and bias: U(-1/√fan_in, 1/√fan_in)."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32, out_sharding: Any = None) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class RowLinear(nnx.Linear):
    """y = xW + b; with a hook for products, as in a step on one CPU, x [..., D] is a matrix of rows.

    Otherwise the kernel's gradient would be a sum over several axes, for which XLA transposes a copy of the cotangent.
    """

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        product = _product.get()
        if product is None or inputs.ndim < 2 or self.dot_general is not jax.lax.dot_general:
            return super().__call__(inputs, out_sharding)
        bias = None if self.bias is None else self.bias[...]
        rows = inputs.reshape(-1, inputs.shape[-1])
        x, kernel, bias = self.promote_dtype((rows, self.kernel[...], bias), dtype=self.dtype)
        y = checkpoint_name(product(x, kernel), PRODUCT)  # a compiled kernel is none of jax.checkpoint's products
        return (y if bias is None else y + bias).reshape(*inputs.shape[:-1], -1)


class Linear(RowLinear):
    """y = xW + b, initialized as `torch.nn.Linear`; `kernel` is torch's `weight` transposed."""

    def __init__(self, d_in: int, d_out: int, bias: bool = True, *, rngs: nnx.Rngs):
        init = uniform(d_in)
        super().__init__(d_in, d_out, use_bias=bias, kernel_init=init, bias_init=init, rngs=rngs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalized(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """scale · (x - mean) / √(variance + ε) + bias over the last axis; its derivative takes fewer passes over x.

    XLA would write the product of scale and 1/σ as a whole array, and without the barriers also σ and the scale.
    """
    return _normalized_forward(x, scale, bias, epsilon)[0]


def _normalized_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    mean = jax.lax.optimization_barrier(x.mean(axis=-1, keepdims=True))
    variance = jnp.square(x - mean).mean(axis=-1, keepdims=True)
    inverse = jax.lax.optimization_barrier(jax.lax.rsqrt(variance + epsilon))
    return (x - mean) * inverse * scale + bias, (x, scale, mean, inverse)


def _normalized_backward(
    epsilon: float, saved: tuple[jax.Array, ...], dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, scale, mean, inverse = saved
    z, dz = (x - mean) * inverse, dy * scale
    rows = tuple(range(x.ndim - 1))
    by_row = dz.mean(axis=-1, keepdims=True), (dz * z).mean(axis=-1, keepdims=True)
    shift, slope = jax.lax.optimization_barrier(by_row)
    return inverse * (dz - shift - z * slope), (dy * z).sum(axis=rows), dy.sum(axis=rows)


normalized.defvjp(_normalized_forward, _normalized_backward)


class LayerNorm(nnx.LayerNorm):
    """LayerNorm over the last axis as `torch.nn.LayerNorm`: epsilon 1e-5, two-pass variance.

    dtype: of the result; by default the widest of input and parameters. The variance is float32 at least.
    """

    def __init__(self, d_model: int, epsilon: float = 1e-5, dtype: Any = None, *, rngs: nnx.Rngs):
        super().__init__(d_model, epsilon=epsilon, dtype=dtype, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        scale, bias = self.scale, self.bias
        if not _cpu.get() or mask is not None or scale is None or bias is None or self.dtype not in (None, x.dtype):
            return super().__call__(x, mask=mask)
        if not x.dtype == scale.dtype == bias.dtype == jnp.float32:
            return super().__call__(x, mask=mask)
        return normalized(x, scale[...], bias[...], self.epsilon)


def rows_of(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows [..., D] of a table [V, D] at int ids [...]; NaN for ids outside it."""
    return table.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


class Embed(nnx.Embed):
    """Embedding table initialized with N(0, std), by default as `torch.nn.Embedding`.

    An id outside the table gives NaN instead of another row.
    """

    def __init__(self, n_vocab: int, d_model: int, std: float = 1.0, *, rngs: nnx.Rngs):
        super().__init__(n_vocab, d_model, embedding_init=jax.nn.initializers.normal(std), rngs=rngs)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        # Not nnx.Embed's lookup, which casts to the dtype of the table at construction: a model made in float32 and
        # given float64 weights would compute and differentiate in float32 from here on.
        return (_lookup.get() or rows_of)(self.embedding[...], inputs)  # [..., D]

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Tied readout: query [..., D] -> logits [..., V], in the query's dtype."""
        return query @ self.embedding[...].astype(query.dtype).T


class Dropout(nnx.Dropout):
    """Dropout with a key passed to the call; the identity if `rng=None`. Holds no random state.

    Raises ValueError if the rate is not in [0, 1].
    """

    def __init__(self, rate: float):
        if isinstance(rate, bool) or not 0 <= rate <= 1:
            raise ValueError(f"dropout_prob={rate} must be a number from 0 to 1")
        super().__init__(rate)

    # The signature differs from nnx.Dropout's on purpose: a key is the only source of randomness.
    def __call__(self, x: jax.Array, rng: jax.Array | None = None) -> jax.Array:  # type: ignore[override]
        return super().__call__(x, deterministic=rng is None, rngs=rng)


def split_rng(rng: jax.Array | None, n: int) -> tuple[jax.Array | None, ...]:
    """Split a key into n keys, or return n times None."""
    return (None,) * n if rng is None else tuple(jax.random.split(rng, n))


class Fixed(nnx.Variable):
    """Array that is saved with the model and not trained, like a buffer in torch."""


class Frozen(nnx.Variable):
    """Weight that is saved with the model, and neither trained nor cast: its module casts it where it is used."""


class HeadProjection(nnx.Module):
    """Linear map to heads: [..., D] -> [..., H, d_k]."""

    def __init__(self, d_model: int, heads: int, d_k: int, bias: bool, *, rngs: nnx.Rngs):
        self.linear = Linear(d_model, heads * d_k, bias, rngs=rngs)
        self.heads = heads
        self.d_k = d_k

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x).reshape(*x.shape[:-1], self.heads, self.d_k)


class FeedForward(nnx.Module):
    """W₂ drop(relu(W₁ x + b₁)) + b₂."""

    def __init__(self, d_model: int, d_ff: int, dropout_prob: float = 0.1, *, rngs: nnx.Rngs):
        self.layer1 = Linear(d_model, d_ff, rngs=rngs)
        self.layer2 = Linear(d_ff, d_model, rngs=rngs)
        self.dropout = Dropout(dropout_prob)

    def __call__(self, x: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """x [..., D] -> [..., D]."""
        return self.layer2(self.dropout(jax.nn.relu(self.layer1(x)), rng))
