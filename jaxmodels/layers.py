"""What several systems share: layers with PyTorch's defaults, the projection to heads, the feed-forward network.

Axes: D = d_model = H·d_k features, H heads. Leading axes are free.

Flax's own defaults differ from PyTorch's in every one of these: the distributions of initial weights, LayerNorm's
epsilon (1e-6 against 1e-5) and its variance (E[x²] - E[x]², which cancels badly when the mean is large).
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

# Where training places the arrays of these modules; see `jaxmodels.sharding`. Vocabularies of characters have any size,
# 65 for one, so that their axis is never divided.
FEED_FORWARD_RULES = [
    (r"layer1\.kernel", P("fsdp", "tensor")),
    (r"layer1\.bias", P("tensor")),
    (r"layer2\.kernel", P("tensor", "fsdp")),
    (r"layer2\.bias", P()),
]
SMALL_RULES = [(r"norm\w*\.(scale|bias)", P()), (r"src_embed\.embedding", P(None, "fsdp"))]

_placement: contextvars.ContextVar[Callable[[jax.Array, str], jax.Array] | None]
_placement = contextvars.ContextVar("placement", default=None)
_remat: contextvars.ContextVar[Callable[[Callable], Callable] | None] = contextvars.ContextVar("remat", default=None)


@contextlib.contextmanager
def hooks(
    *,
    placement: Callable[[jax.Array, str], jax.Array] | None = None,
    remat: Callable[[Callable], Callable] | None = None,
) -> Iterator[None]:
    """What `constrain` and `rematerialised` do to models that are traced inside the block; None: nothing.

    A function that jit has traced before keeps what it was traced with: trace a function of its own for each.
    """
    tokens = _placement.set(placement), _remat.set(remat)
    try:
        yield
    finally:
        _placement.reset(tokens[0])
        _remat.reset(tokens[1])


def constrain(x: jax.Array, name: str) -> jax.Array:
    """x, placed over devices as its name says: a letter per axis, such as "SBD". The identity where no mesh is set."""
    place = _placement.get()
    return x if place is None else place(x, name)


def rematerialised(function: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's call, which the backward pass repeats instead of keeping its inside, where training asks for that."""
    wrap = _remat.get()
    return function if wrap is None else wrap(function)


def uniform(fan_in: int) -> Callable[..., jax.Array]:
    """PyTorch's default for a Linear's weight and for its bias: U(-1/√fan_in, 1/√fan_in)."""
    bound = 1 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Linear(nnx.Linear):
    """y = xW + b, initialised as `torch.nn.Linear`; `kernel` is torch's `weight` transposed."""

    def __init__(self, d_in: int, d_out: int, bias: bool = True, *, rngs: nnx.Rngs):
        init = uniform(d_in)
        super().__init__(d_in, d_out, use_bias=bias, kernel_init=init, bias_init=init, rngs=rngs)


class LayerNorm(nnx.LayerNorm):
    """Normalises the last axis as `torch.nn.LayerNorm` does: epsilon 1e-5, the variance in two passes.

    dtype is that of the result, None for the widest of what comes in; the variance is never narrower than float32.
    """

    def __init__(self, d_model: int, epsilon: float = 1e-5, dtype=None, *, rngs: nnx.Rngs):
        super().__init__(d_model, epsilon=epsilon, dtype=dtype, use_fast_variance=False, rngs=rngs)


class Embed(nnx.Embed):
    """A table of n_vocab rows, N(0, 1) as in `torch.nn.Embedding`; an id outside it gives NaN, not a wrong row."""

    def __init__(self, n_vocab: int, d_model: int, std: float = 1.0, *, rngs: nnx.Rngs):
        super().__init__(n_vocab, d_model, embedding_init=jax.nn.initializers.normal(std), rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:  # type: ignore[override]
        # Not Flax's own lookup, which casts to the dtype of the first table: a model made in float32 and given float64
        # weights would compute, and differentiate, in float32 from here on.
        table = constrain(self.embedding[...], "VD")  # whole: rows of any device's ids are looked up in it
        return table.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


class Dropout(nnx.Dropout):
    """Zeroes a share of x and scales up the rest; with `rng=None` it is the identity. Holds no random state."""

    def __init__(self, rate: float):
        if not 0 <= rate <= 1:
            raise ValueError(f"dropout_prob={rate} must be from 0 to 1")
        super().__init__(rate)

    def __call__(self, x: jax.Array, rng: jax.Array | None = None) -> jax.Array:  # type: ignore[override]
        return super().__call__(x, deterministic=rng is None, rngs=rng)


def split_rng(rng: jax.Array | None, n: int) -> tuple[jax.Array | None, ...]:
    """n keys out of one, or n times None."""
    return (None,) * n if rng is None else tuple(jax.random.split(rng, n))


class Fixed(nnx.Variable):
    """An array that belongs to the model and to its checkpoints, but that no optimizer touches (a torch buffer)."""


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
        return self.layer2(self.dropout(jax.nn.relu(self.layer1(x)), rng))
