"""Sampling from a language model, for every model with the members of `jaxmodels.protocols.LanguageModel`.

Axes: S prompt tokens, n new tokens, B batch, V vocabulary. Ids are [S, B] or [B, S], by the model's `sequence_axis`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.protocols import LanguageModel, check_decoding

MIN_SLOTS = 256  # each cache size compiles another loop, which costs more than a smaller cache saves


class Loop(NamedTuple):
    """Static arguments of the compiled decoding loop."""

    length: int  # of the prompt
    n: int  # new tokens
    n_vocab: int
    top_k: int | None = None
    stop_tokens: tuple[int, ...] = ()


def generate(
    model: LanguageModel,
    ids: jax.Array,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    n_tokens: int | None = None,
    start: jax.Array | None = None,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Continue prompts: ids int [S, B] -> new tokens int32 [n, B] (batch-first models: [B, S] -> [B, n]).

    max_new_tokens: n.
    temperature: 0 is greedy; above 0, tokens are drawn with the key `rng`.
    top_k: draw from the k most likely tokens. top_p: draw from the fewest tokens whose probabilities reach p.
    stop_tokens: a row that has drawn one of them repeats it to the end.
    n_tokens: size of the vocabulary without padding rows, which are never drawn; default all.
    start: int [B], number of left-padding ids in each row.

    The prompt takes one pass; the new tokens take one compiled loop per size of the cache, which grows in powers of
    two, so that a token's cost depends on its position and not on n. Raises ValueError if the model lacks a member of
    `LanguageModel`, if a setting is out of range, or if prompt and new tokens exceed the model's tables.
    """
    check_decoding(model)
    ids = jnp.asarray(ids)
    check(ids, max_new_tokens, temperature, top_k, top_p, rng)
    # A scan over stacked layers would copy each layer's weights for every token.
    model = model.unstacked() if hasattr(model, "unstacked") else model
    axis = model.sequence_axis
    length, batch = ids.shape[axis], ids.shape[1 - axis]
    total = length + max_new_tokens
    jax.eval_shape(lambda: model.init_cache(batch, total))  # raises if the total exceeds the model's tables
    cache = model.init_cache(batch, min(total, capacity(length + 1)), start=start)
    cache.check_room(length, batch, empty=True)  # outside jit, where the values of start are known
    logits, cache = _prefill(model, ids, cache)
    n_vocab = logits.shape[-1] if n_tokens is None else n_tokens
    if not 1 <= n_vocab <= logits.shape[-1]:
        raise ValueError(f"n_tokens={n_tokens} must be from 1 to the vocabulary size {logits.shape[-1]}")
    check_vocabulary(n_vocab, ids, start, axis, stop_tokens)
    sampler = (temperature, top_p) if temperature else None
    key = jax.random.key(0) if rng is None else rng
    loop = Loop(length, int(max_new_tokens), n_vocab, top_k, tuple(stop_tokens))
    return _decode_loop(model, logits, cache, sampler, key, loop)


def capacity(tokens: int) -> int:
    """Number of cache slots for a number of tokens: the next power of two, MIN_SLOTS at least."""
    return max(MIN_SLOTS, 1 << (tokens - 1).bit_length())


def check(ids: Any, max_new_tokens: Any, temperature: float, top_k: int | None, top_p: float | None, rng: Any) -> None:
    """Raises ValueError if an argument of `generate` is out of range."""
    if ids.ndim != 2 or 0 in ids.shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids must be a non-empty matrix of integers, got {ids.dtype}{list(ids.shape)}")
    if not isinstance(max_new_tokens, (int, np.integer)) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be an integer of at least 1")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or more, and finite")
    if temperature and rng is None:
        raise ValueError(f"rng=None, but temperature={temperature} draws tokens; pass a key as rng")
    if not temperature and (top_k is not None or top_p is not None):
        raise ValueError(f"top_k={top_k} and top_p={top_p} need a temperature above 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1")


def check_vocabulary(
    n_vocab: int, ids: jax.Array, start: jax.Array | None, axis: int, stop_tokens: Sequence[int]
) -> None:
    """Raises ValueError if an id or stop token is outside the vocabulary: its logits would be NaN, their argmax 0."""
    text = np.asarray(ids if axis == 0 else ids.T)  # [S, B]
    if start is not None:  # ids of the padding are not used
        text = text[np.arange(len(text))[:, None] >= np.asarray(start)]
    outside = sorted({int(i) for i in (*text[(text < 0) | (text >= n_vocab)], *stop_tokens) if not 0 <= i < n_vocab})
    if outside:
        raise ValueError(f"ids or stop_tokens {outside[:10]} must be from 0 to {n_vocab - 1}")


@functools.partial(jax.jit, donate_argnames="cache")
def _prefill(model: LanguageModel, ids: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
    return model.prefill(ids, cache)


@functools.partial(jax.jit, static_argnames="loop")
def _decode_loop(
    model: LanguageModel,
    logits: jax.Array,
    cache: Any,
    sampler: tuple[Any, Any] | None,
    key: jax.Array,
    loop: Loop,
) -> jax.Array:
    """Tokens after a prompt from its last logits [B, V]; one while-loop per cache size, until its slots are full."""
    length, n, n_vocab, top_k, stop_tokens = loop
    axis = model.sequence_axis
    stops = jnp.asarray(stop_tokens, jnp.int32)

    def step(i: jax.Array | int, logits: jax.Array, out: jax.Array, done: jax.Array) -> tuple[jax.Array, jax.Array]:
        token = sample(logits[:, :n_vocab], sampler, top_k, jax.random.fold_in(key, i))
        if stop_tokens:
            token = jnp.where(done, out[i - 1], token)
            done = jnp.isin(token, stops)  # stays True, as a stopped row repeats its stop token
        return out.at[i].set(token), done

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, out, done, cache = carry
        token = jnp.expand_dims(out[i - 1], axis)
        logits, cache = model.decode(token, cache.unpacked())
        return i + 1, *step(i, jnp.take(logits, 0, axis=axis), out, done), cache.packed()

    batch = logits.shape[0]
    i: jax.Array | int = 1
    end = 1
    out, done = step(0, logits, jnp.zeros((n, batch), jnp.int32), jnp.zeros(batch, bool))
    while end < n:
        cache = cache.grown(min(capacity(length + end), length + n))
        end = n if cache.is_ring else min(n, cache.max_len - length + 1)  # token i needs length + i slots
        unfinished = functools.partial(is_unfinished, end)
        i, out, done, cache = jax.lax.while_loop(unfinished, body, (i, out, done, cache.packed()))
        cache = cache.unpacked()
    out = jnp.where(jnp.arange(n)[:, None] < i, out, out[i - 1])  # if every row stopped early, repeat the last tokens
    return out if axis == 0 else out.T


def is_unfinished(end: int, carry: tuple[Any, ...]) -> jax.Array:
    """True while there are tokens to write before token `end` and rows that have not stopped."""
    i, _, done, _ = carry
    return (i < end) & ~done.all()


def sample(logits: jax.Array, sampler: tuple[Any, Any] | None, top_k: int | None, key: jax.Array) -> jax.Array:
    """Draw one token per row of logits [B, V] -> int32 [B].

    sampler: None for greedy, else (temperature, top_p or None).
    """
    if sampler is None:
        return logits.argmax(axis=-1).astype(jnp.int32)
    temperature, top_p = sampler
    logits = logits.astype(jnp.float32) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        likely = jax.lax.top_k(logits, top_k)[1]  # by index, so that ties keep exactly k tokens
        kept = jnp.zeros(logits.shape, bool).at[jnp.arange(len(logits))[:, None], likely].set(True)
        logits = jnp.where(kept, logits, -jnp.inf)
    if top_p is not None:
        order = jnp.argsort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1))
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # keep a token if those before it do not reach p
        kept = jnp.take_along_axis(before < top_p, jnp.argsort(order, axis=-1), axis=-1)
        logits = jnp.where(kept, logits, -jnp.inf)
    return jax.random.categorical(key, logits).astype(jnp.int32)
