"""The Feedback Transformer in its two variants, sequence-first, and the language model around either.

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
from jaxmodels.feedback.step import no_memory
from jaxmodels.layers import FEED_FORWARD_RULES, SMALL_RULES, Embed, HeadProjection, LayerNorm, Linear, split_rng
from jaxmodels.transformer import check_ids


class Feedback(nnx.Module):
    """What both variants share: layers, the mixture of their outputs into a memory, the final norm.

    Memory of a step: m = Σ_l softmax(w)_l · x^l over l = 0 … L, where x⁰ is the step's input; w starts as ones.
    `memory` M limits what a step sees to the last M of them. The call is one scan (see `recurrence`), `plain` a loop.
    """

    shares_kv = False  # one key and one value projection for all layers

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
        for name, size in {"d_model": d_model, "heads": heads, "d_ff": d_ff, "n_layers": n_layers}.items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        if memory is not None and (not isinstance(memory, int) or memory < 1):
            raise ValueError(f"memory={memory} must be a number of steps of at least 1, or None for all")
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
        """The constructor's arguments."""
        names = ["d_model", "heads", "d_ff", "n_layers", "dropout_prob", "memory"]
        return {name: getattr(self, name) for name in names}

    def __call__(self, x_seq: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """[S, B, D] -> [S, B, D]; raises ValueError for another shape and for S beyond the position tables."""
        self.check(x_seq)
        dtype = jnp.result_type(x_seq, self.weights[...])
        nothing = no_memory(self, x_seq.shape[1], 0, dtype)
        return self.norm(recur(self, x_seq, rng, nothing, jnp.int32(0))[0])

    def init_state(self, batch: int, dtype: Any = None) -> State:
        """The state before the first segment of a text; raises ValueError where `memory` is not limited."""
        return init_state(self, batch, self.weights.dtype if dtype is None else dtype)

    def segment(self, x_seq: jax.Array, state: State, rng: jax.Array | None = None) -> tuple[jax.Array, State]:
        """The next steps [S, B, D] of a text -> their outputs [S, B, D], and the state for the steps after them.

        Outputs are those of the whole text in one call; gradients end where the segment begins. Raises ValueError as
        the call does, and for a state of another model or batch.
        """
        self.check(x_seq, self.memory or 0)
        outputs, state = run_segment(self, x_seq, state, rng)
        return self.norm(outputs), state

    def plain(self, x_seq: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """The same as the call, one step after the other, every sub-module called as a module.

        With a limited memory its dropout draws differ from the call's, which draws by slot.
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

    def mix(self, states: list[jax.Array]) -> jax.Array:
        """The memory of a step's input and its layers' outputs, in their shape."""
        return jnp.tensordot(jax.nn.softmax(self.weights[...]), jnp.stack(states), 1)

    def remember(self, m: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What `plain` keeps of a memory: its key and value for the layers' calls."""
        raise NotImplementedError

    def check(self, x_seq: jax.Array, before: int = 0) -> None:
        if x_seq.ndim != 3 or 0 in x_seq.shape or x_seq.shape[2] != self.d_model:
            raise ValueError(f"x_seq must be a non-empty [S, B, d_model={self.d_model}], got {list(x_seq.shape)}")
        if before + len(x_seq) > FeedbackAttention.P:
            after = f" after {before} of memory" if before else ""
            raise ValueError(f"{len(x_seq)} steps given{after}, but the position tables reach {FeedbackAttention.P}")


class FeedbackTransformer(Feedback):
    """Each layer makes keys and values of its own from the memories: a key without and a value with a bias."""

    def remember(self, m):
        return m, m


class FeedbackTransformerKV(Feedback):
    """One key and one value projection, both without bias, make what all layers attend to."""

    shares_kv = True

    def remember(self, m):
        return self.key(m), self.value(m)


VARIANTS = {cls.__name__: cls for cls in (FeedbackTransformer, FeedbackTransformerKV)}


class AutoregressiveModel(nnx.Module):
    """Token ids to logits of the next token, around a feedback transformer; its `d_model` is the embedding's width."""

    sequence_axis = 0
    sharding_rules = (
        *SMALL_RULES,
        *ATTENTION_RULES,
        *FEED_FORWARD_RULES,
        (r"transformer\.weights", P()),
        (r"generator\.kernel", P("fsdp")),
        (r"generator\.bias", P()),
    )

    def __init__(self, n_vocab: int, transformer: Feedback, *, rngs: nnx.Rngs):
        if n_vocab < 1:
            raise ValueError(f"n_vocab={n_vocab} must be at least 1")
        self.n_vocab = n_vocab
        self.src_embed = Embed(n_vocab, transformer.d_model, rngs=rngs)
        self.transformer = transformer
        self.generator = Linear(transformer.d_model, n_vocab, rngs=rngs)

    def config(self) -> dict[str, Any]:
        """The arguments of `from_config`, as `config.json` keeps them."""
        return {"n_vocab": self.n_vocab, "variant": type(self.transformer).__name__} | self.transformer.config()

    @classmethod
    def from_config(cls, n_vocab: int, variant: str, *, rngs: nnx.Rngs, **sizes: Any) -> "AutoregressiveModel":
        """The model of a `config()`; raises ValueError for a variant of another name."""
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} is none of {', '.join(VARIANTS)}")
        return cls(n_vocab, VARIANTS[variant](**sizes, rngs=rngs), rngs=rngs)

    def __call__(self, ids: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """ids [S, B] int -> logits [S, B, V]; raises ValueError where ids have another rank or are too long."""
        check_ids(ids)
        return self.generator(self.transformer(self.src_embed(ids), rng))

    def plain(self, ids: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """The same, one step after the other, every sub-module called as a module."""
        check_ids(ids)
        return self.generator(self.transformer.plain(self.src_embed(ids), rng))

    def init_state(self, batch: int, dtype: Any = None) -> State:
        """The state before the first segment of a text; see `Feedback.init_state`."""
        return self.transformer.init_state(batch, dtype)

    def segment(self, ids: jax.Array, state: State, rng: jax.Array | None = None) -> tuple[jax.Array, State]:
        """The next ids [S, B] of a text -> logits [S, B, V], and the next state; see `Feedback.segment`."""
        check_ids(ids)
        x, state = self.transformer.segment(self.src_embed(ids), state, rng)
        return self.generator(x), state

    def init_cache(self, batch: int, max_len: int, dtype: Any = None, start: jax.Array | None = None) -> Cache:
        """An empty cache for up to max_len tokens of text a row; dtype None: that of the parameters.

        start: int [B], how many of the first ids of each row will be left padding. Raises ValueError where max_len is
        beyond the position tables or start is not one integer per row.
        """
        dtype = self.src_embed.embedding.dtype if dtype is None else dtype
        return decode.init_cache(self.transformer, batch, max_len, dtype, start)

    def prefill(self, ids: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """The first S tokens [S, B], one after the other -> the last one's logits [B, V] and the filled cache.

        Raises ValueError where the cache is not empty or too short; inside a trace the logits are NaN then.
        """
        check_ids(ids)
        cache.check_room(*ids.shape, empty=True)
        x, filled = decode.advance(self.transformer, self.src_embed(ids), cache)
        return unless_overrun(self.generator(self.transformer.norm(x[-1])), cache, len(ids), empty=True), filled

    def decode(self, ids: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """S further tokens [S, B] -> their logits [S, B, V] and the longer cache.

        Raises ValueError where they do not fit; inside a trace, where the length is unknown, the logits are NaN then.
        """
        check_ids(ids)
        cache.check_room(*ids.shape)
        x, longer = decode.advance(self.transformer, self.src_embed(ids), cache)
        return unless_overrun(self.generator(self.transformer.norm(x)), cache, len(ids)), longer
