"""Cross-entropy and log-probabilities of tokens from the output of a language model's last layer, in chunks of tokens.

The logits of all positions take B·S·V numbers, 800 MB for 4,096 tokens of a vocabulary of 50,304, and are read several
times. Here at most one chunk of them exists, in the backward pass too. If all logits fit one chunk, they are computed
at once.

Axes: B batch, S sequence, C positions of a chunk, K chunks, T positions, N scored positions, D features of the last
layer, V vocabulary. `read` computes logits [..., V] from x [..., D]; it may close over the model's parameters.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Read = Callable[[jax.Array], jax.Array]

CHUNK = 1 << 24  # logits of a chunk on a CPU: 64 MB in float32. Smaller ones make the products' kernels slower.
FORWARD_CHUNK = 1 << 23  # of a chunk on a CPU without a backward pass: closer to the caches' size
DEVICE_CHUNK = 1 << 26  # of a chunk on each accelerator: fewer reductions of the read-out's gradient over a mesh


class ChunkSize(NamedTuple):
    """Number of tokens of a chunk if it is set, otherwise the number of logits that a chunk may have."""

    tokens: int | None
    logits: int


_chunk: contextvars.ContextVar[ChunkSize | None] = contextvars.ContextVar("chunk", default=None)


@contextlib.contextmanager
def chunks(
    tokens: int | None, platform: str = "cpu", devices: int = 1, *, forward_only: bool = False
) -> Iterator[None]:
    """Set the size of the chunks in functions traced inside the block.

    tokens: whose logits are computed together, over all devices; by default as many as the logits of `devices` devices
    of a platform allow. forward_only: no gradients are summed over the chunks; smaller ones are then faster on a CPU.
    jit caches what it traced: jit a new function for each setting.
    """
    logits = (FORWARD_CHUNK if forward_only else CHUNK) if platform == "cpu" else DEVICE_CHUNK
    token = _chunk.set(ChunkSize(tokens, logits * devices))
    try:
        yield
    finally:
        _chunk.reset(token)


def chunk_length(n_vocab: int, positions: int, rows: int = 1) -> int:
    """Number of positions, of `rows` sequences each, whose logits are computed together.

    A power of two if it is not all positions: with at most as many logits as a chunk may have, or the set number of
    tokens; see `chunks`.
    """
    size = _chunk.get() or ChunkSize(None, CHUNK)
    most = max(1, (size.logits // n_vocab if size.tokens is None else size.tokens) // rows)
    return positions if most >= positions else 1 << (most.bit_length() - 1)


def nats(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target]: [..., V] and int [...] -> [...], in float32 or wider."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def token_nats(read: Read, x: jax.Array, targets: jax.Array, axis: int) -> jax.Array:
    """Cross-entropy of each token: x [B, S, D] or [S, B, D], targets without D -> nats with the shape of targets.

    axis: that of S. The backward pass computes the logits of each chunk again. In float32 or wider.
    """
    divided = _divide(read, x, targets, axis)
    if divided is None:
        return nats(read(x), targets)
    found = _token_nats(divided.read, divided.weights, divided.x, divided.targets)  # [K, …, C, …]
    found = jnp.moveaxis(found, 0, axis)
    return jax.lax.slice_in_dim(_merge(found, axis), 0, targets.shape[axis], axis=axis)


def mean_nats(read: Read, x: jax.Array, targets: jax.Array, axis: int, weights: jax.Array | None = None) -> jax.Array:
    """Mean of `token_nats`, or their sum with weights of the shape of targets; a scalar.

    The gradient is computed in the forward pass, when the logits of a chunk are there: a product of x with the
    read-out less than the gradient of `token_nats`, which must know the weight of each token first.
    """
    divided = _divide(read, x, targets, axis)
    if divided is None:
        found = nats(read(x), targets)
        return found.mean() if weights is None else (found * weights).sum()
    n, length = divided.x.shape[0], divided.x.shape[1 + axis]
    if weights is None:
        valid = jnp.expand_dims((jnp.arange(n * length) < targets.shape[axis]).reshape(n, length), 2 - axis)
        factors = jnp.where(valid, 1 / targets.size, 0).astype(divided.dtype)  # [K, 1, C] or [K, C, 1]
    else:
        factors = _split(weights, axis, n, length).astype(divided.dtype)  # [K, …, C, …], zeros for padding
    return _weighted_sum(divided.read, divided.weights, divided.x, divided.targets, factors)


class _Divided(NamedTuple):
    """Arguments of `token_nats` in chunks: read(x, *weights), x [K, B, C, D] or [K, C, B, D], targets without D.

    dtype: of the nats.
    """

    read: Callable[..., jax.Array]
    weights: tuple[jax.Array, ...]
    x: jax.Array
    targets: jax.Array
    dtype: Any


def _divide(read: Read, x: jax.Array, targets: jax.Array, axis: int) -> _Divided | None:
    """Divide the axis S into chunks of nearly equal length, the last one padded; None if one chunk holds all."""
    positions = targets.shape[axis]
    logits = jax.eval_shape(read, x)
    length = chunk_length(logits.shape[-1], positions, targets.size // positions)
    if length == positions:
        return None
    n = -(-positions // length)
    length = -(-positions // n)
    x, targets = (_split(array, axis, n, length) for array in (x, targets))
    # The parameters that `read` closes over become arguments: a custom derivative must not close over them.
    converted, weights = jax.closure_convert(read, x[0])
    return _Divided(converted, tuple(weights), x, targets, jnp.promote_types(logits.dtype, jnp.float32))


def _split(array: jax.Array, axis: int, n: int, length: int) -> jax.Array:
    """Divide an axis into n chunks, the last one padded with zeros, along a new leading axis."""
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, n * length - array.shape[axis])
    array = jnp.pad(array, padding)
    array = array.reshape(*array.shape[:axis], n, length, *array.shape[axis + 1 :])
    return jnp.moveaxis(array, axis, 0)


def _merge(array: jax.Array, axis: int) -> jax.Array:
    """Join an axis with the next one."""
    return array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_nats(
    read: Callable[..., jax.Array], weights: tuple[jax.Array, ...], x: jax.Array, targets: jax.Array
) -> jax.Array:
    """Nats [K, …] of chunks x [K, …, D]."""
    return jax.lax.map(lambda chunk: nats(read(chunk[0], *weights), chunk[1]), (x, targets))


def _token_nats_forward(read: Any, *arguments: Any) -> tuple[jax.Array, Any]:
    values, marks = _values(arguments), _trained(arguments[0])
    return _token_nats(read, *values), (values, marks)


def _token_nats_backward(read: Any, saved: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    (weights, x, targets), marks = saved
    _, *gradients = _gradients(read, weights, x, targets, cotangent, marks)
    return *gradients, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum(
    read: Callable[..., jax.Array],
    weights: tuple[jax.Array, ...],
    x: jax.Array,
    targets: jax.Array,
    factors: jax.Array,
) -> jax.Array:
    """Sum of factors times nats of chunks x [K, …, D]; not differentiated by the factors."""
    return (_token_nats(read, weights, x, targets) * factors).sum()


def _weighted_sum_forward(read: Any, *arguments: Any) -> tuple[jax.Array, Any]:
    weights, x, targets, factors = _values(arguments)
    total, *gradients = _gradients(read, weights, x, targets, factors, _trained(arguments[0]))
    return total, gradients


def _weighted_sum_backward(read: Any, gradients: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    weights, x = jax.tree.map(lambda a: a * cotangent.astype(a.dtype), gradients)
    return weights, x, None, None


_token_nats.defvjp(_token_nats_forward, _token_nats_backward, symbolic_zeros=True)
_weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward, symbolic_zeros=True)


def _values(arguments: Any) -> Any:
    """Values of the arguments of a forward pass with symbolic_zeros."""
    return jax.tree.map(lambda leaf: leaf.value, arguments)


def _trained(weights: tuple[Any, ...]) -> tuple[Any, ...]:
    """() for each array that is differentiated, None for each other one: no leaves, so that jit does not trace them."""
    return tuple(() if weight.perturbed else None for weight in weights)


def _gradients(
    read: Callable[..., jax.Array],
    weights: tuple[jax.Array, ...],
    x: jax.Array,
    targets: jax.Array,
    factors: jax.Array,
    trained: tuple[Any, ...],
) -> tuple[jax.Array, tuple[jax.Array | None, ...], jax.Array]:
    """Sum of factors times nats, and its gradients by the trained weights (None for the others) and by x.

    Gradients of weights are summed over the chunks in float32 or wider.
    """
    places = [i for i, mark in enumerate(trained) if mark is not None]

    def body(sums: Any, chunk: Any) -> tuple[Any, jax.Array]:
        x, targets, factors = chunk

        def losses(x: jax.Array, own: Sequence[jax.Array]) -> jax.Array:
            replaced = dict(zip(places, own, strict=True))
            return nats(read(x, *(replaced.get(i, weight) for i, weight in enumerate(weights))), targets)

        found, pull = jax.vjp(losses, x, [weights[i] for i in places])
        factors = jnp.broadcast_to(factors, found.shape).astype(found.dtype)
        dx, own = pull(factors)
        total, gradients = sums
        gradients = [a + b.astype(a.dtype) for a, b in zip(gradients, own, strict=True)]
        return (total + (found * factors).sum(), gradients), dx

    zeros = [jnp.zeros(weights[i].shape, jnp.promote_types(weights[i].dtype, jnp.float32)) for i in places]
    (total, own), dx = jax.lax.scan(body, (jnp.zeros((), factors.dtype), zeros), (x, targets, factors))
    gradients = dict(zip(places, own, strict=True))
    found = tuple(gradients[i].astype(w.dtype) if i in gradients else None for i, w in enumerate(weights))
    return total, found, dx


def token_log_probs(
    read: Read,
    x: jax.Array,
    positions: jax.Array,
    targets: jax.Array,
    n: jax.Array | int | None = None,
    *,
    greedy: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """log softmax(read(x))[position, target] of N pairs of a position and a target -> [N], in float32 or wider.

    x: [T, D]. positions, targets: int [N]. n: number of pairs to compute, the first ones; default all. The others are
    0. greedy: also return bool [N], True where the target has the largest logit, the first of equal ones.

    For scoring: positions in any order, n traced; use `token_nats` for a loss that is differentiated.
    """
    (size,) = positions.shape
    shape = jax.eval_shape(read, x[:1])
    dtype = jnp.promote_types(shape.dtype, jnp.float32)
    chunk = chunk_length(shape.shape[-1], size)
    padded = -(-size // chunk) * chunk
    positions, targets = (jnp.pad(a, (0, padded - size)) for a in (positions, targets))

    def body(i: Any, carry: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array | None]:
        found, first = carry
        here, wanted = (jax.lax.dynamic_slice(a, (i * chunk,), (chunk,)) for a in (positions, targets))
        logits = read(x[here])  # [C, V]
        found = jax.lax.dynamic_update_slice(found, -nats(logits, wanted), (i * chunk,))
        if first is not None:
            first = jax.lax.dynamic_update_slice(first, logits.argmax(axis=1) == wanted, (i * chunk,))
        return found, first

    start = (jnp.zeros(padded, dtype), jnp.zeros(padded, bool) if greedy else None)
    number: Any = padded // chunk if n is None else -(-n // chunk)
    found, first = jax.lax.fori_loop(0, number, body, start)
    valid = jnp.arange(size) < (size if n is None else n)
    return jnp.where(valid, found[:size], 0), None if first is None else first[:size] & valid
