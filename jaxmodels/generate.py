"""Text out of a language model: sampling, once, for every model with `init_cache`, `prefill` and `decode`.

Axes: S prompt tokens, n new tokens, B batch, V vocabulary. Ids lie as the model has them: [S, B] or [B, S], as its
`sequence_axis` says.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MIN_SLOTS = 256  # every size of the cache is a loop to compile; below this one growing saves less than that costs


def generate(
    model: Any,
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
    """Continues prompts: ids [S, B] -> the new tokens [n, B] (batch-first models: [B, S] -> [B, n]).

    temperature 0 is greedy; above it, tokens are drawn with `rng` from the top_k most likely, or from the fewest whose
    probabilities reach top_p, or from all. A row that has drawn one of `stop_tokens` repeats it to the end. Only
    the first n_tokens of the vocabulary are written: what follows them may be padding. start [B] says how many ids of
    each row are left padding. One pass over the prompt, then one compiled loop on the device, with
    a cache that grows in powers of two: a token's cost follows its position, not the length that was asked for.
    Raises ValueError for settings out of range, and where prompt and new tokens are beyond the model's tables.
    """
    ids = jnp.asarray(ids)
    check(ids, max_new_tokens, temperature, top_k, top_p, rng)
    model = model.unstacked() if hasattr(model, "unstacked") else model  # see NeoX: a scan copies weights every token
    axis = model.sequence_axis
    length, batch = ids.shape[axis], ids.shape[1 - axis]
    total = length + max_new_tokens
    jax.eval_shape(lambda: model.init_cache(batch, total))  # is it within the model's tables?
    cache = model.init_cache(batch, min(total, capacity(length + 1)), start=start)
    cache.check_room(length, batch, empty=True)  # inside jit, start is unknown
    logits, cache = _prefill(model, ids, cache)
    n_vocab = logits.shape[-1] if n_tokens is None else n_tokens
    if not 1 <= n_vocab <= logits.shape[-1]:
        raise ValueError(f"n_tokens={n_tokens} must be from 1 to the vocabulary's {logits.shape[-1]}")
    check_vocabulary(n_vocab, ids, start, axis, stop_tokens)
    sampler = (temperature, top_p) if temperature else None
    key = jax.random.key(0) if rng is None else rng
    return _continue(model, logits, cache, sampler, key, length, max_new_tokens, top_k, tuple(stop_tokens), n_vocab)


def capacity(tokens: int) -> int:
    """Slots of a cache for so many tokens: the next power of two, from MIN_SLOTS on."""
    return max(MIN_SLOTS, 1 << (tokens - 1).bit_length())


def check(ids, max_new_tokens, temperature, top_k, top_p, rng) -> None:
    if ids.ndim != 2 or 0 in ids.shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids must be a batch of non-empty prompts of integers, got {ids.dtype}{list(ids.shape)}")
    if not isinstance(max_new_tokens, (int, np.integer)) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be a whole number of at least 1")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or more")
    if temperature and rng is None:
        raise ValueError(f"temperature={temperature} draws tokens: pass a key as rng")
    if not temperature and (top_k is not None or top_p is not None):
        raise ValueError("top_k and top_p choose among draws: they need a temperature above 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1")


def check_vocabulary(n_vocab: int, ids, start, axis: int, stop_tokens: Sequence[int]) -> None:
    """An id outside the vocabulary makes NaN logits, and the argmax of those is token 0: it must not come so far."""
    text = np.asarray(ids if axis == 0 else ids.T)
    if start is not None:  # what stands in the padding is never read
        text = text[np.arange(len(text))[:, None] >= np.asarray(start)]
    outside = sorted({int(i) for i in (*text[(text < 0) | (text >= n_vocab)], *stop_tokens) if not 0 <= i < n_vocab})
    if outside:
        raise ValueError(f"ids or stop_tokens {outside[:10]} are outside the vocabulary, 0 to {n_vocab - 1}")


@functools.partial(jax.jit, donate_argnames="cache")
def _prefill(model, ids, cache):
    return model.prefill(ids, cache)


@functools.partial(jax.jit, static_argnames=("length", "n", "top_k", "stop_tokens", "n_vocab"))
def _continue(
    model,
    logits,
    cache,
    sampler,
    key,
    length: int,
    n: int,
    top_k: int | None,
    stop_tokens: tuple[int, ...],
    n_vocab: int,
):
    """n tokens after a prompt of `length`: as many loops as the cache has sizes, each to the end of its slots."""
    axis = model.sequence_axis
    stops = jnp.asarray(stop_tokens, jnp.int32)

    def step(i, logits, out, done):
        token = sample(logits[:, :n_vocab], sampler, top_k, jax.random.fold_in(key, i))
        if stop_tokens:
            token = jnp.where(done, out[i - 1], token)
            done = jnp.isin(token, stops)  # and stays so: a row that has stopped repeats its stop token
        return out.at[i].set(token), done

    def body(carry):
        i, out, done, cache = carry
        token = jnp.expand_dims(out[i - 1], axis)
        logits, cache = model.decode(token, cache.unpacked())
        return i + 1, *step(i, jnp.take(logits, 0, axis=axis), out, done), cache.packed()

    batch = logits.shape[0]
    i, end = 1, 1
    out, done = step(0, logits, jnp.zeros((n, batch), jnp.int32), jnp.zeros(batch, bool))
    while end < n:
        cache = cache.grown(min(capacity(length + end), length + n))
        end = n if cache.is_ring else min(n, cache.max_len - length + 1)  # token i needs length + i slots
        unfinished = functools.partial(goes_on, end)
        i, out, done, cache = jax.lax.while_loop(unfinished, body, (i, out, done, cache.packed()))
        cache = cache.unpacked()
    out = jnp.where(jnp.arange(n)[:, None] < i, out, out[i - 1])  # every row had stopped: repeat the last tokens
    return out if axis == 0 else out.T


def goes_on(end: int, carry) -> jax.Array:
    """Are there tokens to write before token `end`, and rows that have not stopped?"""
    i, _, done, _ = carry
    return (i < end) & ~done.all()


def sample(logits: jax.Array, sampler: tuple[Any, Any] | None, top_k: int | None, key: jax.Array) -> jax.Array:
    """One token per row of logits [B, V] -> int32 [B]; sampler: None for greedy, else (temperature, top_p or None)."""
    if sampler is None:
        return logits.argmax(axis=-1).astype(jnp.int32)
    temperature, top_p = sampler
    logits = logits.astype(jnp.float32) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        likely = jax.lax.top_k(logits, top_k)[1]  # by place: of several that are as likely, only so many
        kept = jnp.zeros(logits.shape, bool).at[jnp.arange(len(logits))[:, None], likely].set(True)
        logits = jnp.where(kept, logits, -jnp.inf)
    if top_p is not None:
        order = jnp.argsort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1))
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # a token is kept if those before it don't reach p
        kept = jnp.take_along_axis(before < top_p, jnp.argsort(order, axis=-1), axis=-1)
        logits = jnp.where(kept, logits, -jnp.inf)
    return jax.random.categorical(key, logits).astype(jnp.int32)
