"""Cross-entropy and log-probabilities of tokens from the output of a language model's last layer, in chunks of tokens.

The logits of all positions take B·S·V numbers, 800 MB for 4,096 tokens of a vocabulary of 50,304, and are read several
times. Here at most one chunk of them exists, in the backward pass too. If all logits fit one chunk, they are computed
at once. On a mesh, each device computes those of its own tokens, with the read-out's weights gathered for each chunk;
or, where that takes less communication, those of a part of the vocabulary for the tokens of all devices: see
`DividedVocabulary`.

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

from jaxmodels.sharding import DividedVocabulary

Read = Callable[[jax.Array], jax.Array]

CHUNK = 1 << 25  # logits of a chunk on a CPU: 128 MB in float32. Smaller ones make the products' kernels slower.
FORWARD_CHUNK = 1 << 23  # of a chunk on a CPU without a backward pass: closer to the caches' size
DEVICE_CHUNK = 1 << 26  # of a chunk on each accelerator: fewer reductions of the read-out's gradient over a mesh
DIVIDED_CHUNK = 1 << 24  # the same with the vocabulary divided: smaller chunks take no more communication


class ChunkSize(NamedTuple):
    """Number of tokens of a chunk if it is set, otherwise the number of logits that a chunk may have.

    divided: the number if the vocabulary is divided over the mesh of `vocabulary`.
    """

    tokens: int | None
    logits: int
    divided: int = 0
    vocabulary: DividedVocabulary | None = None


_chunk: contextvars.ContextVar[ChunkSize | None] = contextvars.ContextVar("chunk", default=None)


@contextlib.contextmanager
def chunks(
    tokens: int | None,
    platform: str = "cpu",
    devices: int = 1,
    *,
    forward_only: bool = False,
    vocabulary: DividedVocabulary | None = None,
) -> Iterator[None]:
    """Set the size of the chunks in functions traced inside the block.

    tokens: whose logits are computed together, over all devices; by default as many as the logits of `devices` devices
    of a platform allow. forward_only: no gradients are summed over the chunks; smaller ones are then faster on a CPU.
    vocabulary: divides that of a read-out over a mesh where it applies. jit caches what it traced: jit a new function
    for each setting.
    """
    logits = (FORWARD_CHUNK if forward_only else CHUNK) if platform == "cpu" else DEVICE_CHUNK
    token = _chunk.set(ChunkSize(tokens, logits * devices, min(logits, DIVIDED_CHUNK) * devices, vocabulary))
    try:
        yield
    finally:
        _chunk.reset(token)


def chunk_length(n_vocab: int, positions: int, rows: int = 1, *, divided: bool = False) -> int:
    """Number of positions, of `rows` sequences each, whose logits are computed together.

    A power of two if it is not all positions: with at most as many logits as a chunk may have, or the set number of
    tokens; see `chunks`. divided: the vocabulary is divided over a mesh.
    """
    size = _chunk.get() or ChunkSize(None, CHUNK)
    logits = size.divided if divided else size.logits
    most = max(1, (logits // n_vocab if size.tokens is None else size.tokens) // rows)
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
    found = _token_nats(divided.reader, divided.weights, divided.x, divided.targets)  # [K, …, C, …]
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
    return _weighted_sum(divided.reader, divided.weights, divided.x, divided.targets, factors)


class _Reader(NamedTuple):
    """Function read(x, *weights) to the logits of a chunk, and where its arrays are placed.

    batch_axis: of a chunk.
    """

    read: Callable[..., jax.Array]
    batch_axis: int
    vocabulary: DividedVocabulary | None

    def logits(self, x: jax.Array, weights: Sequence[jax.Array]) -> jax.Array:
        found = self.read(x, *weights)
        return found if self.vocabulary is None else self.vocabulary.logits(found, self.batch_axis)

    def gathered(self, x: jax.Array) -> jax.Array:
        """Place a chunk where its logits are computed."""
        return x if self.vocabulary is None else self.vocabulary.tokens(x, self.batch_axis)

    def own(self, x: jax.Array) -> jax.Array:
        """Place each row of a chunk on its device."""
        return x if self.vocabulary is None else self.vocabulary.rows(x, self.batch_axis)


class _Divided(NamedTuple):
    """Arguments of `token_nats` in chunks: x [K, B, C, D] or [K, C, B, D], targets without D.

    dtype: of the nats.
    """

    reader: _Reader
    weights: tuple[jax.Array, ...]
    x: jax.Array
    targets: jax.Array
    dtype: Any


def _divide(read: Read, x: jax.Array, targets: jax.Array, axis: int, *, whole: bool = False) -> _Divided | None:
    """Divide the axis S into chunks of nearly equal length, the last one padded; None if one chunk holds all.

    whole: do not divide the vocabulary.
    """
    positions = targets.shape[axis]
    rows = targets.size // positions
    logits = jax.eval_shape(read, x)
    n_vocab = logits.shape[-1]
    length = chunk_length(n_vocab, positions, rows)
    if length == positions:
        return None
    vocabulary = None if whole else (_chunk.get() or ChunkSize(None, CHUNK)).vocabulary
    if vocabulary is not None and not vocabulary.applies(n_vocab, targets.size, -(-positions // length)):
        vocabulary = None
    if vocabulary is not None:
        length = chunk_length(n_vocab, positions, rows, divided=True)
    n = -(-positions // length)
    length = -(-positions // n)
    chunked = _split(x, axis, n, length)
    # The parameters that `read` closes over become arguments: a custom derivative must not close over them.
    converted, weights = jax.closure_convert(read, chunked[0])
    if vocabulary is not None:
        placed = [vocabulary.weight(weight, n_vocab) for weight in weights]
        if any(weight is None for weight in placed):
            return _divide(read, x, targets, axis, whole=True)
        weights = placed
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    reader = _Reader(converted, 1 - axis, vocabulary)
    return _Divided(reader, tuple(weights), chunked, _split(targets, axis, n, length), dtype)


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
def _token_nats(reader: _Reader, weights: tuple[jax.Array, ...], x: jax.Array, targets: jax.Array) -> jax.Array:
    """Nats [K, …] of chunks x [K, …, D]."""

    def of(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = reader.logits(reader.gathered(chunk[0]), weights)
        return nats(logits, chunk[1]) if reader.vocabulary is None else _nats_and_slope(logits, chunk[1])[0]

    return jax.lax.map(of, (x, targets))


def _token_nats_forward(reader: Any, *arguments: Any) -> tuple[jax.Array, Any]:
    values, marks = _values(arguments), _trained(arguments[0])
    return _token_nats(reader, *values), (values, marks)


def _token_nats_backward(reader: Any, saved: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    (weights, x, targets), marks = saved
    _, *gradients = _gradients(reader, weights, x, targets, cotangent, marks)
    return *gradients, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum(
    reader: _Reader,
    weights: tuple[jax.Array, ...],
    x: jax.Array,
    targets: jax.Array,
    factors: jax.Array,
) -> jax.Array:
    """Sum of factors times nats of chunks x [K, …, D]; not differentiated by the factors."""
    return (_token_nats(reader, weights, x, targets) * factors).sum()


def _weighted_sum_forward(reader: Any, *arguments: Any) -> tuple[jax.Array, Any]:
    weights, x, targets, factors = _values(arguments)
    total, *gradients = _gradients(reader, weights, x, targets, factors, _trained(arguments[0]))
    return total, gradients


def _weighted_sum_backward(reader: Any, gradients: Any, cotangent: jax.Array) -> tuple[Any, ...]:
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
    reader: _Reader,
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

        def logits_of(x: jax.Array, own: Sequence[jax.Array]) -> jax.Array:
            replaced = dict(zip(places, own, strict=True))
            return reader.logits(x, [replaced.get(i, weight) for i, weight in enumerate(weights)])

        own = [weights[i] for i in places]
        if reader.vocabulary is None:
            found, pull = jax.vjp(lambda x, own: nats(logits_of(x, own), targets), x, own)
            factors = jnp.broadcast_to(factors, found.shape).astype(found.dtype)
            dx, own = pull(factors)
        else:
            logits, pull = jax.vjp(logits_of, reader.gathered(x), own)
            found, slope = _nats_and_slope(logits, targets)
            factors = jnp.broadcast_to(factors, found.shape).astype(found.dtype)
            dx, own = pull((slope * factors[..., None]).astype(logits.dtype))
            dx = reader.own(dx)
        total, gradients = sums
        gradients = [a + b.astype(a.dtype) for a, b in zip(gradients, own, strict=True)]
        return (total + (found * factors).sum(), gradients), dx

    # A zero that waits for x: XLA may allocate an array that depends on nothing before the layers are computed.
    zero, x = jax.lax.optimization_barrier((jnp.zeros((), factors.dtype), x))
    zeros = [jnp.full(weights[i].shape, zero, jnp.promote_types(weights[i].dtype, jnp.float32)) for i in places]
    (total, own), dx = jax.lax.scan(body, (zero, zeros), (x, targets, factors))
    gradients = dict(zip(places, own, strict=True))
    found = tuple(gradients[i].astype(w.dtype) if i in gradients else None for i, w in enumerate(weights))
    if any(weights[i].dtype != own.dtype for i, own in gradients.items()):
        # Before the rest of the backward pass, so that the wider sums are not held meanwhile.
        found, dx = jax.lax.optimization_barrier((found, dx))
    return total, found, dx


def _nats_and_slope(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`nats`, and their derivatives by the logits, softmax(logits) - onehot(target): [..., V].

    Sums over the vocabulary instead of an indexed access, which each device computes for its part of one that is
    divided. On a CPU without a mesh this is slower.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    chosen = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
    largest = logits.max(axis=-1, keepdims=True)
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    exponentials = jnp.exp(logits - largest)
    total = exponentials.sum(axis=-1, keepdims=True)
    found = jnp.log(total[..., 0]) + largest[..., 0] - jnp.where(chosen, logits, 0).sum(axis=-1)
    return found, exponentials / total - chosen


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
