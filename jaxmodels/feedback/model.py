"""Feedback Transformer in two variants, sequence-first, and the language model around either.

Axes: S sequence, n memories, B batch, H heads, D = d_model = H·d_k features, L layers, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxmodels.attention import ATTENTION_RULES
from jaxmodels.cache import Cache, unless_overrun
from jaxmodels.feedback import decode
from jaxmodels.feedback.attention import FeedbackAttention, FeedbackTransformerLayer
from jaxmodels.feedback.recurrence import at_step, recur
from jaxmodels.feedback.segments import State, init_state, run_segment
from jaxmodels.feedback.step import check_layers, no_memory
from jaxmodels.layers import (
    FEED_FORWARD_RULES,
    SMALL_RULES,
    Embed,
    HeadProjection,
    LayerNorm,
    Linear,
    check_ids,
    check_sizes,
    float_dtype,
    split_rng,
)
from jaxmodels.process.texts import quoted

LONGEST_MEMORY = 2**30  # steps, which are counted in int32


class Feedback(nnx.Module):
    """Base class of both variants: layers, the mixture of their outputs into a memory, the final norm.

    Memory of a step: m = Σ_l softmax(w)_l · x^l over l = 0 … L, where x⁰ is the step's input; w is initialized to ones.
    memory: number M of last memories that a step attends to; default all. The call is one scan (see `recurrence`),
    `plain` a loop. Raises ValueError if a size is below 1.
    """

    sequence_axis = 0
    cache_by_position = True
    shares_kv = False  # True: one key and one value projection for all layers

    def __init__(
        self,
        d_model: int,
        heads: int,
        d_ff: int,
        n_layers: int,
        dropout_prob: float = 0.0,
        *,
        memory: int | None = None,
        rngs: nnx.Rngs,
    ):
        check_sizes(d_model=d_model, heads=heads, d_ff=d_ff, n_layers=n_layers)
        if memory is not None and (type(memory) is not int or not 1 <= memory <= LONGEST_MEMORY):
            raise ValueError(
                f"memory={quoted(memory)} must be an integer from 1 to {LONGEST_MEMORY:,}, or None for all steps"
            )
        self.d_model, self.heads, self.d_ff, self.n_layers = d_model, heads, d_ff, n_layers
        self.dropout_prob, self.memory = dropout_prob, memory
        self.layers = nnx.List(
            FeedbackTransformerLayer(
                FeedbackAttention(heads, d_model, dropout_prob, is_kv_precomputed=self.shares_kv, rngs=rngs),
                d_model,
                d_ff,
                dropout_prob,
                rngs=rngs,
            )
            for _ in range(n_layers)
        )
        self.norm = LayerNorm(d_model, rngs=rngs)
        self.weights = nnx.Param(jnp.ones(n_layers + 1, jnp.float32))
        if self.shares_kv:
            self.key = HeadProjection(d_model, heads, d_model // heads, bias=False, rngs=rngs)
            self.value = HeadProjection(d_model, heads, d_model // heads, bias=False, rngs=rngs)

    def config(self) -> dict[str, Any]:
        """Arguments of the constructor, as JSON values."""
        names = ["d_model", "heads", "d_ff", "n_layers", "dropout_prob", "memory"]
        return {name: getattr(self, name) for name in names}

    def __call__(self, x_seq: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """x_seq [S, B, D] -> [S, B, D]; raises ValueError if its shape differs or S is beyond the position tables."""
        self.check(x_seq)
        dtype = jnp.result_type(x_seq, self.weights[...])
        nothing = no_memory(self, x_seq.shape[1], 0, dtype)
        return self.norm(recur(self, x_seq, rng, nothing, jnp.int32(0))[0])

    def init_state(self, batch: int, dtype: Any = None) -> State:
        """State before the first segment of a text; raises ValueError if `memory` is not limited."""
        return init_state(self, batch, self.weights.dtype if dtype is None else dtype)

    def segment(self, x_seq: jax.Array, state: State, rng: jax.Array | None = None) -> tuple[jax.Array, State]:
        """The next S steps [S, B, D] of a text -> outputs [S, B, D], and the state for the next segment.

        Outputs equal those of the whole text in one call; gradients stop at the start of the segment. Raises ValueError
        as the call does, and if the state does not fit the model or the batch.
        """
        self.check(x_seq, self.memory or 0)
        outputs, state = run_segment(self, x_seq, state, rng)
        return self.norm(outputs), state

    # [feedback.loop]
    def plain(self, x_seq: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """Same as the call, as a Python loop over steps, each over arrays of the memories that exist.

        With limited memory, dropout masks differ from the call's, which are drawn by slot.
        """
        self.check(x_seq)
        outputs: list[jax.Array] = []
        memories: list[tuple[jax.Array, jax.Array]] = []
        for t, x in enumerate(x_seq):
            seen = memories if self.memory is None else memories[-self.memory :]
            key, value = map(jnp.stack, zip(*seen, strict=True)) if seen else (None, None)
            states = [x]
            for layer, layer_rng in zip(self.layers, split_rng(at_step(rng, t), len(self.layers)), strict=True):
                states.append(layer(x=states[-1], key=key, value=value, rng=layer_rng))
            outputs.append(states[-1])
            memories.append(self.remember(self.mix(states)))
        return self.norm(jnp.stack(outputs))

    # [feedback.step]
    def mix(self, states: list[jax.Array]) -> jax.Array:
        """Mix a step's input and its layers' outputs, each [..., D], into its memory [..., D]."""
        return jnp.tensordot(jax.nn.softmax(self.weights[...]), jnp.stack(states), 1)

    def remember(self, m: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Key and value of a memory [B, D], as the layers' calls take them."""
        raise NotImplementedError

    def check(self, x_seq: jax.Array, before: int = 0) -> None:
        """Raises ValueError if x_seq has another shape, or `before` earlier steps and it exceed the tables."""
        if x_seq.ndim != 3 or 0 in x_seq.shape or x_seq.shape[2] != self.d_model:
            raise ValueError(f"x_seq must be a non-empty [S, B, d_model={self.d_model}], got {list(x_seq.shape)}")
        reach = check_layers(self)
        if before + len(x_seq) > reach:
            after = f" after memory={before}" if before else ""
            raise ValueError(f"{len(x_seq)} steps{after} given; the position tables reach back P={reach}")


class FeedbackTransformer(Feedback):
    """Variant in which each layer projects the memories to its own keys (no bias) and values (with bias)."""

    # [feedback.loop]
    def remember(self, m: jax.Array) -> tuple[jax.Array, jax.Array]:
        return m, m


class FeedbackTransformerKV(Feedback):
    """Variant in which one key and one value projection, both without bias, serve all layers."""

    shares_kv = True

    # [feedback.loop]
    def remember(self, m: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.key(m), self.value(m)


VARIANTS = {cls.__name__: cls for cls in (FeedbackTransformer, FeedbackTransformerKV)}


class AutoregressiveModel(nnx.Module):
    """Causal language model around a feedback transformer: token ids to logits of the next token.

    Raises ValueError if n_vocab is below 1.
    """

    sequence_axis = 0
    cache_by_position = True
    sharding_rules = (
        *SMALL_RULES,
        *ATTENTION_RULES,
        *FEED_FORWARD_RULES,
        (r"transformer\.weights", P()),
        (r"generator\.kernel", P("fsdp")),
        (r"generator\.bias", P()),
    )

    def __init__(self, n_vocab: int, transformer: Feedback, *, rngs: nnx.Rngs):
        check_sizes(n_vocab=n_vocab)
        self.n_vocab = n_vocab
        self.src_embed = Embed(n_vocab, transformer.d_model, rngs=rngs)
        self.transformer = transformer
        self.generator = Linear(transformer.d_model, n_vocab, rngs=rngs)

    def config(self) -> dict[str, Any]:
        """Arguments of `from_config`, as JSON values."""
        return {"n_vocab": self.n_vocab, "variant": type(self.transformer).__name__} | self.transformer.config()

    @classmethod
    def from_config(cls, n_vocab: int, variant: str, *, rngs: nnx.Rngs, **sizes: Any) -> "AutoregressiveModel":
        """Build the model of a `config()`; raises ValueError if a value is out of range.

        variant: name of the transformer's class. sizes: its constructor's arguments.
        """
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} must be one of {', '.join(VARIANTS)}")
        return cls(n_vocab, VARIANTS[variant](**sizes, rngs=rngs), rngs=rngs)

    def __call__(self, ids: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """ids int [S, B] -> logits [S, B, V]; raises ValueError if ids have another rank or exceed the tables."""
        return self.read(self.features(ids, rng))

    def features(self, ids: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """ids int [S, B] -> output [S, B, D] of the transformer, of which `read` makes the logits; as the call."""
        check_ids(ids)
        return self.transformer(self.src_embed(ids), rng)

    def read(self, x: jax.Array) -> jax.Array:
        """Logits [..., V] from the output [..., D] of the transformer."""
        return self.generator(x)

    def plain(self, ids: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """Same as the call, as a Python loop over steps; see `Feedback.plain`."""
        check_ids(ids)
        return self.generator(self.transformer.plain(self.src_embed(ids), rng))

    def init_state(self, batch: int, dtype: Any = None) -> State:
        """State before the first segment of a text; see `Feedback.init_state`."""
        return self.transformer.init_state(batch, dtype)

    def segment(self, ids: jax.Array, state: State, rng: jax.Array | None = None) -> tuple[jax.Array, State]:
        """The next S ids [S, B] of a text -> logits [S, B, V], and the next state; see `Feedback.segment`."""
        check_ids(ids)
        x, state = self.transformer.segment(self.src_embed(ids), state, rng)
        return self.generator(x), state

    def init_cache(self, batch: int, max_len: int, dtype: Any = None, start: jax.Array | None = None) -> Cache:
        """Empty cache for up to max_len tokens per row.

        dtype: of keys and values; default that of the parameters. start: int [B], number of left-padding ids in each
        row. Raises ValueError if max_len is beyond the position tables or start is not one integer per row.
        """
        dtype = float_dtype(self.src_embed) if dtype is None else dtype
        return decode.init_cache(self.transformer, batch, max_len, dtype, start)

    def prefill(self, ids: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """The first S tokens [S, B], step by step -> logits [B, V] of the last one, and the filled cache.

        Raises ValueError if the cache is not empty or too short; inside a trace the logits are NaN instead.
        """
        check_ids(ids)
        cache.check_room(*ids.shape, empty=True)
        x, filled = decode.advance(self.transformer, self.src_embed(ids), cache)
        return unless_overrun(self.generator(self.transformer.norm(x[-1])), cache, len(ids), empty=True), filled

    def decode(self, ids: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """The next S tokens [S, B] -> logits [S, B, V], and the extended cache.

        Raises ValueError if they do not fit; inside a trace, where the length is unknown, the logits are NaN instead.
        """
        check_ids(ids)
        cache.check_room(*ids.shape)
        x, extended = decode.advance(self.transformer, self.src_embed(ids), cache)
        return unless_overrun(self.generator(self.transformer.norm(x)), cache, len(ids)), extended
