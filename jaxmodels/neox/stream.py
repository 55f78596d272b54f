"""Streaming generation: tokens one by one, and their text as soon as no later token can change it.

Axes: B = 1 batch, S prompt tokens, V vocabulary. For batch-first models.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.cache import Cache
from jaxmodels.generate import sample

END_OF_TEXT = "<|endoftext|>"


class Stream:
    """Iterator over the tokens that `jaxmodels.generate.generate` returns at once; compiled ahead of time.

    length: number of prompt tokens. n_tokens: size of the tokenizer's vocabulary; the model's rows beyond it are
    padding and never drawn. temperature, top_k, top_p: as in `generate`; seed: of the draws.
    """

    def __init__(
        self,
        model: Any,
        length: int,
        max_new_tokens: int,
        n_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ):
        self.max_new_tokens = max_new_tokens
        sampler = (temperature, top_p) if temperature else None
        self.weights, structure = jax.tree.flatten(model)  # a list: jit would flatten a module again for every token
        self.cache = model.init_cache(1, length + max_new_tokens)

        def draw(logits: jax.Array, i: jax.Array | int) -> jax.Array:
            logits = jnp.where(jnp.arange(logits.shape[-1]) < n_tokens, logits, -jnp.inf)
            return sample(logits, sampler, top_k, jax.random.fold_in(jax.random.key(seed), i))

        def prefill(weights: list[jax.Array], ids: jax.Array, cache: Cache) -> tuple[jax.Array, jax.Array, Cache]:
            logits, cache = jax.tree.unflatten(structure, weights).prefill(ids, cache)  # [1, V]
            return draw(logits, 0), jnp.ones((), jnp.int32), cache.packed()

        def decode(
            weights: list[jax.Array], token: jax.Array, i: jax.Array, cache: Cache
        ) -> tuple[jax.Array, jax.Array, Cache]:
            logits, cache = jax.tree.unflatten(structure, weights).decode(token[:, None], cache.unpacked())  # [1, 1, V]
            return draw(logits[:, 0], i), i + 1, cache.packed()

        began = time.perf_counter()
        arguments = self.weights, jax.ShapeDtypeStruct((1, length), jnp.int32), self.cache
        self.prefill = jax.jit(prefill, donate_argnums=2).lower(*arguments).compile()
        arguments = self.weights, *jax.eval_shape(prefill, *arguments)
        self.decode = jax.jit(decode, donate_argnums=3).lower(*arguments).compile()
        self.compiled_in = time.perf_counter() - began

    def __call__(self, ids: Sequence[int]) -> Iterator[int]:
        """Tokens after a prompt of `length` ids. Call it once: the cache is donated."""
        token, i, cache = self.prefill(self.weights, jnp.asarray([ids], jnp.int32), self.cache)
        for _ in range(self.max_new_tokens - 1):
            following, i, cache = self.decode(self.weights, token, i, cache)  # dispatched before this token is fetched
            yield int(token[0])
            token = following
        yield int(token[0])


class StreamedText:
    """Incremental decoder of tokens to text; holds back incomplete characters and possible beginnings of stop texts."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        from tokenizers.decoders import DecodeStream

        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.end = tokenizer.token_to_id(END_OF_TEXT)
        self.stream = DecodeStream(skip_special_tokens=True)
        self.held = ""
        self.ended = False

    def add(self, token: int) -> str:
        """Add a token and return the text that is final now.

        Sets `ended` at a stop text, which is left out, or at the end-of-text token.
        """
        if token == self.end:
            self.ended = True
            return self.rest()
        self.held += self.stream.step(self.tokenizer, token) or ""
        found = [self.held.index(stop) for stop in self.stops if stop in self.held]
        if found:
            self.ended = True
            self.held = self.held[: min(found)]
            return self.rest()
        # Hold the longest suffix that begins a stop text.
        suffixes = range(len(self.held), 0, -1)
        holds = (n for n in suffixes if any(stop.startswith(self.held[-n:]) for stop in self.stops))
        keep = len(self.held) - next(holds, 0)
        final, self.held = self.held[:keep], self.held[keep:]
        return final

    def rest(self) -> str:
        """Return the text that was held back."""
        rest, self.held = self.held, ""
        return rest
