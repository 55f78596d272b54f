"""GPT-NeoX (arXiv 2204.06745), batch-first; layers are stacked for training and listed for decoding.

Axes: B batch, S sequence, H heads, D = n_hidden = H·d_k features, V vocabulary, L layers.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxmodels import native
from jaxmodels.cache import Cache, align_left, make_cache, unless_overrun
from jaxmodels.layers import (
    check_decodes,
    check_ids,
    check_sizes,
    constrain,
    float_dtype,
    hooks,
    read_only,
    rematerialized,
    unrolls,
)
from jaxmodels.neox.block import BLOCK_RULES, Block, Embedding, FinalNorm, Readout, Tables, stack, unstack
from jaxmodels.neox.config import LARGEST, NeoXConfig
from jaxmodels.neox.int8 import Int8Linear, plain_linear, with_linears
from jaxmodels.neox.narrow import NarrowLinear, can_narrow, narrowed
from jaxmodels.neox.sequential import adapted
from jaxmodels.neox.weight_only import WeightOnlyLinear
from jaxmodels.process.texts import quoted
from jaxmodels.rope import rotary_tables

KINDS = ("llm.int8", "weights", "weights-4")  # of `quantize`
THRESHOLD = 6.0


class NeoX(nnx.Module):
    """Causal language model: token ids to logits of the next token.

    `layers` is one Block whose arrays have a leading layer axis. The call scans over it, so that compile time does not
    grow with L. With `stacked=False`, or after `unstacked()`, it is a list of L blocks, which decoding needs: a scan
    copies each layer's slice of the weights for every token.
    """

    sequence_axis = 1
    cache_by_position = True
    # Paths of listed layers contain their numbers; stacked arrays have a leading layer axis.
    sharding_rules = (
        (r"embedding\.emb\.embedding", P("tensor", "fsdp")),
        *((rf"layers\.\d+\.{name}", spec) for name, spec in BLOCK_RULES),
        *((rf"layers\.{name}", P(None, *spec)) for name, spec in BLOCK_RULES),
        (r"(pre_ln_attn|pre_ln_ffn|final_norm\.ln)\.(scale|bias)", P()),
        (r"readout\.linear\.kernel", P("fsdp", "tensor")),
    )

    def __init__(self, config: NeoXConfig, *, stacked: bool = True, rngs: nnx.Rngs):
        self.settings = config
        self.embedding = Embedding(config, rngs=rngs)
        self.layers: Any
        if stacked:
            make = nnx.vmap(lambda rngs: Block(config, rngs=rngs))
            self.layers = make(rngs.split(config.n_layers))
        else:
            self.layers = nnx.List(Block(config, rngs=rngs) for _ in range(config.n_layers))
        self.final_norm = FinalNorm(config, rngs=rngs)
        if not config.tied:
            self.readout = Readout(config, rngs=rngs)

    def config(self) -> dict[str, Any]:
        """Arguments of `from_config`, as JSON values."""
        config = dataclasses.asdict(self.settings) | {"stacked": self.is_stacked}
        if self.int8_threshold is not None:
            return config | {"int8_threshold": self.int8_threshold}
        return config if self.quantization is None else config | {"quantization": self.quantization}

    @classmethod
    def from_config(
        cls,
        *,
        stacked: bool = True,
        int8_threshold: float | None = None,
        quantization: str | None = None,
        rngs: nnx.Rngs,
        **fields: Any,
    ) -> "NeoX":
        """Build the model of a `config()`; raises ValueError if a value is out of range.

        int8_threshold: quantize the blocks' weights by LLM.int8. quantization: "weights" or "weights-4" for the
        weights alone. See `quantize`. fields: those of NeoXConfig.
        """
        if not isinstance(stacked, bool):
            raise ValueError(f"stacked={quoted(stacked)} must be True or False")
        model = cls(NeoXConfig(**fields), stacked=stacked, rngs=rngs)
        if quantization is not None:
            if quantization not in KINDS[1:] or int8_threshold is not None:
                raise ValueError(
                    f"quantization={quoted(quantization)} must be {' or '.join(KINDS[1:])}, without int8_threshold"
                )
            return quantize(model, kind=quantization)
        return model if int8_threshold is None else quantize(model, int8_threshold)

    def adapted(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """Rename a state_dict of the original implementation for `from_torch`; see `jaxmodels.neox.sequential`."""
        return adapted(state_dict, self.settings)

    @property
    def is_stacked(self) -> bool:
        """True if `layers` is one block with a leading layer axis."""
        return not isinstance(self.layers, nnx.List | list | tuple)

    @property
    def int8_threshold(self) -> float | None:
        """Outlier threshold of a model quantized by LLM.int8, see `quantize`; None for another one."""
        return getattr(self.first_linear, "threshold", None)

    @property
    def quantization(self) -> str | None:
        """Kind of a quantized model, see `quantize`; None if the model is not quantized."""
        if isinstance(self.first_linear, WeightOnlyLinear):
            return KINDS[1] if self.first_linear.bits == 8 else KINDS[2]
        return None if self.int8_threshold is None else "llm.int8"

    @property
    def first_linear(self) -> Any:
        """A linear map of the first block, or of the stacked ones."""
        layer = self.layers if self.is_stacked else self.layers[0]
        return getattr(getattr(layer, "attention", None), "qkv_lin", None)

    def unstacked(self) -> "NeoX":
        """Model with a list of layers, each array a copy of its slice; itself if it has one already."""
        return self.with_layers(nnx.List(self.blocks())) if self.is_stacked else self

    def blocks(self) -> list[Block]:
        """List of the layers."""
        return unstack(self.layers, self.settings.n_layers) if self.is_stacked else list(self.layers)

    def narrowed(self) -> "NeoX | None":
        """Model that computes in float32 with the 16-bit weights of this one, as they are; for inference.

        None if its weights are in other dtypes or of other modules, or if this process's device is no CPU, or the
        kernel of `jaxmodels.native` cannot be compiled. Itself if it is such a model. Layers are listed.
        """
        if isinstance(self.first_linear, NarrowLinear):
            return self
        if type(self) is not NeoX or not can_narrow(self) or not native.available():
            return None
        return narrowed(self, nnx.List(self.blocks()))

    def stacked(self) -> "NeoX":
        """Inverse of `unstacked`."""
        return self if self.is_stacked else self.with_layers(stack(self.blocks()))

    def with_layers(self, layers: Any) -> "NeoX":
        """Model with other layers; all other arrays are shared with this one."""
        model = jax.tree.map(lambda array: array, self)  # a copy: a trace must not mutate modules from outside it
        model.layers = layers
        return model

    def __call__(self, ids: jax.Array, start: jax.Array | None = None) -> jax.Array:
        """ids int [B, S] -> logits [B, S, V].

        start: int [B], number of left-padding ids in each row; their logits are 0. Raises ValueError if ids have
        another rank or a row is padding only.
        """
        return self.forward(ids, start, plain=False)

    def plain(self, ids: jax.Array, start: jax.Array | None = None) -> jax.Array:
        """Same as the call, with a Python loop over the layers and the whole score matrix in each attention."""
        return self.unstacked().forward(ids, start, plain=True)

    def forward(self, ids: jax.Array, start: jax.Array | None, plain: bool) -> jax.Array:
        """Body of the call and of `plain`."""
        return self.read(self.features(ids, start, plain))

    # [neox.model]
    def features(self, ids: jax.Array, start: jax.Array | None = None, plain: bool = False) -> jax.Array:
        """ids int [B, S] -> output [B, S, D] of the final norm, of which `read` makes the logits; as the call."""
        check_ids(ids, "[B, S]")
        s = ids.shape[1]
        if start is not None:  # shift rows to position 0, so that the causal mask excludes the padding
            start = checked_start(start, *ids.shape)
            ids = align_left(ids.T, start).T
        x, rotary = self.embed(ids, jnp.arange(s))  # [B, S, D]

        def body(x: jax.Array, layer: Block) -> tuple[jax.Array, None]:
            return constrain(layer(x, rotary, plain), "BSD"), None

        if not plain:  # the plain path calls every sub-module as a module; jax.checkpoint would hide the calls
            remat = self.settings.remat
            body = jax.checkpoint(read_only(body), prevent_cse=False) if remat else rematerialized(body)
        if self.is_stacked:
            # Not if weights are narrower than activations: those of all layers would be widened at once.
            uniform = all(array.dtype == x.dtype for array in jax.tree.leaves(self.layers))
            x = x if uniform else widened(body, x, self.layers)
            unroll = unrolls(self.settings.n_layers) and uniform and not self.settings.remat
            x, _ = jax.lax.scan(read_only(body), x, self.layers, unroll=unroll)
        else:
            for layer in self.layers:
                x, _ = body(x, layer)
        x = self.final_norm(x)  # [B, S, D]
        return x if start is None else move_right(x, start)

    # [neox.model]
    def embed(self, ids: jax.Array, positions: jax.Array) -> tuple[jax.Array, Tables]:
        """Embed ids [B, S] -> x [B, S, D] in the compute dtype, and rotary tables of positions [S] or [S, B]."""
        x = constrain(self.embedding(ids), "BSD")
        x = x if self.settings.dtype is None else x.astype(self.settings.dtype)
        positions = positions[None] if positions.ndim == 1 else positions.T  # [1 or B, S]
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        cos, sin = rotary_tables(positions, self.settings.d_rope, self.settings.rope_base, dtype)
        return x, (cos[:, :, None], sin[:, :, None])  # [1 or B, S, 1, d_rope/2]

    def read(self, x: jax.Array) -> jax.Array:
        """Logits [..., V] from the output [..., D] of the final norm."""
        if not self.settings.tied:
            return self.readout(x)
        return self.embedding.attend(x)

    def init_cache(self, batch: int, max_len: int, dtype: Any = None, start: jax.Array | None = None) -> Cache:
        """Empty cache for up to max_len tokens per row.

        dtype: of keys and values; default the compute dtype. start: int [B], number of left-padding ids in each row.
        Raises ValueError if max_len < 1 or start is not one integer per row.
        """
        check_sizes(max_len=max_len)
        check_decodes(self, r"layers(\.\d+)?(\.attention)?")
        dtype = dtype or self.settings.dtype or float_dtype(self.embedding)
        shape = (batch, self.settings.kv_heads, max_len, self.settings.d_k)
        layers = [
            {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)} for _ in range(self.settings.n_layers)
        ]
        return make_cache(layers, batch, start)

    def prefill(self, ids: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """The first S tokens [B, S] in one pass -> logits [B, V] of the last one, and the filled cache.

        Raises ValueError if the cache is not empty or too short; inside a trace the logits are NaN instead.
        """
        check_ids(ids, "[B, S]")
        batch, n = ids.shape
        cache.check_room(n, batch, empty=True)
        if cache.start is not None:
            ids = align_left(ids.T, cache.start).T
        with hooks(product=native.wide_product):
            x, layers = self.decode_layers(ids, cache, None)  # [B, S, D]
        last = x[:, -1] if cache.start is None else x[jnp.arange(batch), n - 1 - cache.start]  # [B, D]
        return unless_overrun(self.read(self.final_norm(last)), cache, n, empty=True), cache.advance(layers, n)

    def decode(self, ids: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """The next S tokens [B, S] -> logits [B, S, V], and the extended cache.

        Raises ValueError if they do not fit; inside a trace, where the length is unknown, the logits are NaN instead.
        """
        check_ids(ids, "[B, S]")
        batch, n = ids.shape
        cache.check_room(n, batch)
        x, layers = self.decode_layers(ids, cache, cache.positions(n))  # [B, S, D]
        logits = self.read(self.final_norm(x)).swapaxes(0, 1)  # [S, B, V]
        return unless_overrun(logits, cache, n).swapaxes(0, 1), cache.advance(layers, n)

    def decode_layers(
        self, ids: jax.Array, cache: Cache, positions: jax.Array | None
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], ...]]:
        """The next tokens [B, S] through all layers -> x [B, S, D] before the final norm, and the layers' caches."""
        x, rotary = self.embed(ids, jnp.arange(ids.shape[1]) if positions is None else positions)
        new = []
        for layer, layer_cache in zip(self.blocks(), cache.layers, strict=True):
            x, layer_cache = layer.decode(x, rotary, layer_cache, positions)
            new.append(layer_cache)
        return x, tuple(new)


def widened(body: Callable[[jax.Array, Any], tuple[jax.Array, None]], x: jax.Array, layers: Any) -> jax.Array:
    """x in the dtype in which the first of stacked layers returns it: weights that are wider than x widen it."""

    def first(x: jax.Array, layers: Any) -> jax.Array:
        return body(x, jax.tree.map(operator.itemgetter(0), layers))[0]

    return x.astype(jax.eval_shape(first, x, layers).dtype)


def quantize(model: NeoX, threshold: float | None = None, *, kind: str = "llm.int8") -> NeoX:
    """Model with linear maps in 8 or 4 bits; all other arrays are shared with the given one.

    kind: "llm.int8" for the blocks' linear maps by LLM.int8, which rounds activations too: see `Int8Linear`. "weights"
        for those and the readout with 8-bit weights and activations as they are, "weights-4" for the same with 4-bit
        weights in groups of 128 input features: see `WeightOnlyLinear`.
    threshold: for LLM.int8: input features of this magnitude or larger are computed in 16 bits; 0 for none, default 6.

    Stacked layers stay stacked. Raises ValueError if the model is not a NeoX or is quantized already, if the kind is
    unknown, if the threshold is negative, not finite or of another kind, if a weight is not finite (for LLM.int8 in
    float16), or if one of the linear maps was replaced by another kind of module.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={quoted(kind)} must be one of {', '.join(KINDS)}")
    if not isinstance(model, NeoX):
        raise ValueError(f"model is a {type(model).__name__}; quantize supports NeoX")
    if model.quantization is not None:
        with_threshold = "" if model.int8_threshold is None else f", with threshold={model.int8_threshold}"
        raise ValueError(f"model is already quantized, kind={model.quantization}{with_threshold}")
    if kind != "llm.int8" and threshold is not None:
        raise ValueError(f"threshold={quoted(threshold)} is for kind='llm.int8'; kind={kind!r} has no outliers")
    threshold = THRESHOLD if threshold is None else threshold
    if isinstance(threshold, bool) or not 0 <= threshold <= LARGEST:
        raise ValueError(f"threshold={quoted(threshold)} must be 0 (no outliers) or more, and finite")

    def make(linear: nnx.Linear) -> nnx.Module:
        if kind == "llm.int8":
            return Int8Linear(linear, float(threshold))
        return WeightOnlyLinear(linear, bits=4 if kind == "weights-4" else 8)

    layers = [model.layers] if model.is_stacked else model.blocks()
    new = [with_linears(layer, make) for layer in layers]
    quantized = model.with_layers(new[0] if model.is_stacked else nnx.List(new))
    if kind != "llm.int8" and not model.settings.tied:
        readout: Any = quantized.readout
        readout.linear = make(plain_linear(getattr(readout, "linear", None), "readout.linear"))
    return quantized


def checked_start(start: jax.Array, batch: int, s: int) -> jax.Array:
    """Convert start to int32 [B]; raises ValueError if it is not one integer per row or a row is padding only."""
    checked = make_cache([], batch, start).start
    assert checked is not None
    if not isinstance(checked, jax.core.Tracer) and np.asarray(checked).max() >= s:
        raise ValueError(f"start={checked.tolist()} must leave at least one of the {s} tokens of each row")
    return checked


def move_right(x: jax.Array, start: jax.Array) -> jax.Array:
    """Shift each row of x [B, S, D] right by `start` [B], filling with zeros: the inverse of `align_left`."""
    rows = jnp.arange(x.shape[1]) - start[:, None]  # [B, S]
    moved = jnp.take_along_axis(x, jnp.maximum(rows, 0)[..., None], axis=1)
    return jnp.where(rows[..., None] >= 0, moved, 0)
