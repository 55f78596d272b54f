"""Log-probabilities of tokens from the output of a language model's last layer, in chunks of positions.

The logits of all positions take B·S·V numbers, 800 MB for 4,096 tokens of a vocabulary of 50,304, and are read several
times. Here at most one chunk of them exists.

Axes: T positions, N scored positions, D features of the last layer, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

CHUNK = 1 << 24  # logits of a chunk: 64 MB in float32


def chunk_length(n_vocab: int, positions: int) -> int:
    """Number of positions whose logits are computed together: a power of two with at most CHUNK logits."""
    most = max(1, CHUNK // n_vocab)
    return min(1 << (most.bit_length() - 1), 1 << max(0, positions - 1).bit_length())


def token_log_probs(
    read: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    positions: jax.Array,
    targets: jax.Array,
    n: jax.Array | int | None = None,
    *,
    greedy: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """log softmax(read(x))[position, target] of N pairs of a position and a target -> [N], in float32 or wider.

    read: x [..., D] -> logits [..., V]. x: [T, D]. positions, targets: int [N]. n: number of pairs to compute, the
    first ones; default all. The others are 0. greedy: also return bool [N], True where the target has the largest
    logit, the first of equal ones.

    It can be differentiated if n is not traced.
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
        logits = read(x[here]).astype(dtype)  # [chunk, V]
        chosen = jnp.take_along_axis(logits, wanted[:, None], axis=1)[:, 0]
        log_probs = chosen - jax.nn.logsumexp(logits, axis=1)
        found = jax.lax.dynamic_update_slice(found, log_probs, (i * chunk,))
        if first is not None:
            first = jax.lax.dynamic_update_slice(first, logits.argmax(axis=1) == wanted, (i * chunk,))
        return found, first

    start = (jnp.zeros(padded, dtype), jnp.zeros(padded, bool) if greedy else None)
    chunks: Any = padded // chunk if n is None else -(-n // chunk)
    found, first = jax.lax.fori_loop(0, chunks, body, start)
    valid = jnp.arange(size) < (size if n is None else n)
    return jnp.where(valid, found[:size], 0), None if first is None else first[:size] & valid
