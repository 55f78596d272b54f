"""Sub-modules that a user replaced: every fast path uses them, or refuses them in one line."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxmodels.attention import MultiHeadAttention
from jaxmodels.feedback import (
    AutoregressiveModel,
    FeedbackAttention,
    FeedbackTransformer,
    FeedbackTransformerKV,
    FeedbackTransformerLayer,
)
from jaxmodels.feedback.parallel import from_parallel
from jaxmodels.layers import Dropout, Embed, FeedForward, HeadProjection, LayerNorm, Linear
from jaxmodels.neox import NeoX, NeoXConfig, quantize
from jaxmodels.neox.block import Attention, Block
from jaxmodels.retro.attention import ChunkedCrossAttention, SelfAttention
from jaxmodels.transformer import TransformerLayer
from tests.common import V, assert_close, filled, language_model, normal, token_ids
from tests.jaxmodels.retro import common as retro

S, B, D = 4, 3, 6


class GatedFeedForward(nnx.Module):
    """W₂(gelu(W₁x) · Vx): a kind with other parts than the original's."""

    def __init__(self, rngs, d=D):
        self.up, self.gate, self.down = (Linear(*sizes, rngs=rngs) for sizes in ((d, 7), (d, 7), (7, d)))
        self.dropout = Dropout(0.0)

    def __call__(self, x, rng=None):
        return self.down(self.dropout(nnx.gelu(self.up(x)) * self.gate(x), rng))


class GELUFeedForward(FeedForward):
    """The same arrays and names, another activation: no conversion can notice."""

    def __call__(self, x, rng=None):
        return self.layer2(self.dropout(nnx.gelu(self.layer1(x)), rng))


class HalvedAttention(FeedbackAttention):
    def __call__(self, query, key, value, rng=None):
        return 0.5 * super().__call__(query, key, value, rng)


class OwnAttention(FeedbackAttention):
    """Own mathematics over arrays of memories: cannot read slots."""

    def __call__(self, query, key, value, rng=None):
        return self.output(query + self.key(key).mean(0).reshape(query.shape))


class PostNormLayer(FeedbackTransformerLayer):
    def __call__(self, x, key, value, rng=None):
        if key is not None:
            x = self.norm_self_attn(x + self.attn(query=x, key=key, value=value))
        return self.norm_ff(x + self.feed_forward(x))


class Doubled(nnx.Module):
    """Twice another module's output."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, *args, **kwargs):
        return 2 * self.inner(*args, **kwargs)


def lora(d_in: int, d_out: int, bias: bool = True) -> nnx.LoRALinear:
    return nnx.LoRALinear(d_in, d_out, lora_rank=2, use_bias=bias, rngs=nnx.Rngs(5))


def other_arrays(model):
    first, second = model.layers
    first.feed_forward.layer1, first.attn.output = lora(D, 7), lora(D, D)
    first.attn.query.linear = lora(D, D, bias=False)
    second.feed_forward = GatedFeedForward(nnx.Rngs(0))
    second.norm_ff = nnx.RMSNorm(D, rngs=nnx.Rngs(1))


def same_arrays(model):
    """No conversion of weights can notice these."""
    first, second = model.layers
    first.feed_forward.__class__ = GELUFeedForward
    second.attn.__class__ = HalvedAttention
    second.attn.scale = 0.3
    second.dropout = Doubled(second.dropout)


def feedback(variant: type = FeedbackTransformer, **others) -> AutoregressiveModel:
    def make():
        return AutoregressiveModel(V, variant(D, 3, 7, 2, **others, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))

    return filled(make, scale=0.3)


def redrawn(model: nnx.Module) -> nnx.Module:
    """The model with new arrays, those of replaced sub-modules included: LoRA starts at zero."""
    return filled(lambda: nnx.eval_shape(lambda: model), scale=0.3)


def compiled(function, **static):
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **static)


def assert_all_paths_agree(model, ids, cache_axis: int = 0):
    """The call, plain, and decoding token by token; and gradients of the call and of plain."""

    def loss(model, plain):
        logits = model.plain(ids) if plain else model(ids)
        return jnp.sin(logits).sum(), logits

    gradient = compiled(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (_, logits), gradients = gradient(model, False)
    assert_close(gradient(model, True), ((_, logits), gradients), 1e-10)
    decode = compiled(lambda model, ids, cache: model.decode(ids, cache))
    cache = model.init_cache(ids.shape[1 - cache_axis], ids.shape[cache_axis], logits.dtype)
    pieces = []
    for piece in jnp.split(ids, ids.shape[cache_axis], cache_axis):
        decoded, cache = decode(model, piece, cache)
        pieces.append(decoded)
    assert_close(jnp.concatenate(pieces, cache_axis), logits, 1e-10)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("replace", [other_arrays, same_arrays])
def test_feedback_uses_replaced_parts(replace):
    model = feedback()
    replace(model.transformer)
    assert_all_paths_agree(redrawn(model) if replace is other_arrays else model, token_ids(0, S, B))


@pytest.mark.usefixtures("x64")
def test_feedback_uses_an_activation_that_only_one_layer_has():
    ids, model = token_ids(0, S, B), feedback()
    call = jax.jit(lambda model: model(ids))
    original = call(model)
    model.transformer.layers[1].feed_forward.__class__ = GELUFeedForward
    assert jnp.abs(call(model) - original).max() > 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_feedback_with_shared_keys_uses_replaced_projections_and_its_own_remember():
    class Normed(FeedbackTransformerKV):
        def remember(self, m):
            key, value = super().remember(m)
            return jnp.tanh(key), value

    model = feedback(Normed)
    model.transformer.key.linear = lora(D, D, bias=False)
    assert_all_paths_agree(redrawn(model), token_ids(0, S, B))


@pytest.mark.usefixtures("x64")
def test_feedback_uses_the_call_of_another_layer():
    """Steps after the first, where a post-norm layer without memory is another function."""
    model = feedback(FeedbackTransformerKV).transformer
    model.layers[0].__class__ = PostNormLayer
    x = normal(0, S, B, D)
    slots = jax.jit(lambda model: model(x))(model)
    original = jax.jit(lambda model: model(x))(feedback(FeedbackTransformerKV).transformer)
    assert jnp.abs(slots - original).max() > 1e-3


class Batch(nnx.BatchNorm):
    """Normalizes by the statistics of the batch, and updates its own."""

    def __init__(self):
        super().__init__(D, use_running_average=False, rngs=nnx.Rngs(0))


def test_feedback_refuses_an_attention_that_cannot_read_slots_and_parts_with_state():
    ids = jax.ShapeDtypeStruct((S, B), jnp.int32)
    call = lambda model: jax.eval_shape(lambda ids: model(ids), ids)  # noqa: E731
    model = feedback()
    model.transformer.layers[1].attn.__class__ = OwnAttention
    with pytest.raises(ValueError, match=r"layers\.1 .*FeedbackTransformerLayer.*OwnAttention.*Slots"):
        call(model)
    model = feedback()
    model.transformer.layers[1].attn = nnx.MultiHeadAttention(3, D, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"layers\.1\.attn .*MultiHeadAttention.*FeedbackAttention"):
        call(model)
    model = feedback()
    model.transformer.layers[0].norm_ff = Batch()
    with pytest.raises(ValueError, match=r"layers\.0\.norm_ff .*mean"):
        call(model)
    cache = model.init_cache(B, S)
    with pytest.raises(ValueError, match=r"layers\.0\.norm_ff .*mean"):
        jax.eval_shape(lambda ids: model.decode(ids, cache), ids)
    model.eval()
    assert call(model).shape == (S, B, V)


def test_feedback_differentiates_beside_integers_and_keys():
    model = feedback()
    model.transformer.layers[0].dropout = Quiet()
    ids = token_ids(0, S, B)
    jax.eval_shape(jax.grad(lambda model: model(ids).sum(), allow_int=True), model)


class Quiet(nnx.Module):
    """Holds a stream of keys and integers that evaluation does not touch."""

    def __init__(self):
        self.inner = nnx.Dropout(0.5, deterministic=True, rngs=nnx.Rngs(0))
        self.table = nnx.Variable(jnp.arange(3))

    def __call__(self, x, rng=None):
        return self.inner(x) * self.table[1]


@pytest.mark.usefixtures("x64")
def test_the_transformer_uses_replaced_parts():
    model = language_model("rotary", d_model=D, heads=3)
    layer = model.encoder.layers[1]
    layer.feed_forward, layer.norm_ff = GatedFeedForward(nnx.Rngs(0)), nnx.RMSNorm(D, rngs=nnx.Rngs(1))
    layer.self_attn.query = Doubled(HeadProjection(D, 3, 2, bias=True, rngs=nnx.Rngs(0)))
    layer.self_attn.query_rotary_pe.base = 100.0
    model.encoder.norm = Doubled(LayerNorm(D, rngs=nnx.Rngs(0)))
    model.generator.projection = lora(D, V)
    assert_all_paths_agree(redrawn(model), token_ids(0, S, B))


class Clipped(MultiHeadAttention):
    def __call__(self, **arguments):
        return jnp.clip(super().__call__(**arguments), -1, 1)


class SkippedLayer(TransformerLayer):
    def __call__(self, x, mask, rng=None):
        return x


def test_the_transformer_refuses_to_decode_what_only_its_call_does():
    model = language_model("plain")
    model.encoder.layers[1].self_attn.__class__ = Clipped
    with pytest.raises(ValueError, match=r"encoder\.layers\.1\.self_attn .*Clipped.*decode.*Attention"):
        model.init_cache(B, S)
    model = language_model("plain")
    model.encoder.layers[0].__class__ = SkippedLayer
    with pytest.raises(ValueError, match=r"encoder\.layers\.0 .*SkippedLayer.*TransformerLayer"):
        model.init_cache(B, S)
    model = language_model("plain")
    model.encoder.layers[0].self_attn = Doubled(model.encoder.layers[0].self_attn)
    with pytest.raises(ValueError, match=r"encoder\.layers\.0\.self_attn .*Doubled.*init_cache"):
        model.init_cache(B, S)
    assert language_model("plain").init_cache(B, S).max_len == S


CONFIG = NeoXConfig(V, D, 2, 3, rope_percentage=1.0, n_ff=7)


class GatedBlock(Block):
    def __call__(self, x, rotary, plain=False):
        return 0.5 * super().__call__(x, rotary, plain)


class GatedNeoXAttention(Attention):
    def __call__(self, x, rotary, plain=False):
        return 0.5 * super().__call__(x, rotary, plain)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("stacked", [True, False])
def test_neox_uses_replaced_parts(stacked):
    model = NeoX(CONFIG, stacked=stacked, rngs=nnx.Rngs(0))

    def replace(layer, make):
        layer.ffn = make(lambda rngs: GatedFeedForward(rngs))
        layer.pre_ln_attn = make(lambda rngs: nnx.RMSNorm(D, rngs=rngs))
        layer.attention.output = make(lambda rngs: nnx.LoRALinear(D, D, lora_rank=2, rngs=rngs))

    if stacked:
        replace(model.layers, lambda part: nnx.vmap(part)(nnx.Rngs(0).split(2)))
    else:
        replace(model.layers[1], lambda part: part(nnx.Rngs(0)))
    assert_all_paths_agree(redrawn(model), token_ids(0, B, S), cache_axis=1)


class LowRankEmbed(Embed):
    """Adds to the table, in both of its uses."""

    def __call__(self, inputs, out_sharding=None):
        return super().__call__(inputs) + 1

    def attend(self, query, out_sharding=None):
        return super().attend(query) + 3 * query.sum(-1, keepdims=True)


@pytest.mark.usefixtures("x64")
def test_neox_reads_out_by_its_own_embedding():
    model = filled(lambda: NeoX(NeoXConfig(V, D, 1, 3, rope_percentage=1.0, n_ff=7, tied=True), rngs=nnx.Rngs(0)))
    x = normal(0, 2, D)
    plain = model.read(x)
    model.embedding.emb.__class__ = LowRankEmbed
    assert_close(model.read(x), plain + 3 * x.sum(-1, keepdims=True))
    model.embedding.emb = Doubled(model.embedding.emb)
    with pytest.raises(ValueError, match=r"embedding\.emb .*Doubled.*attend"):
        model.read(x)


def test_neox_refuses_what_a_scan_or_the_cache_or_int8_would_leave_out():
    ids = jax.ShapeDtypeStruct((B, S), jnp.int32)
    model = NeoX(CONFIG, rngs=nnx.Rngs(0))
    model.layers.pre_ln_ffn = nnx.vmap(lambda _: Batch())(nnx.Rngs(0).split(2))
    with pytest.raises(ValueError, match=r"pre_ln_ffn .*mean"):
        jax.eval_shape(lambda ids: model(ids), ids)
    model = NeoX(CONFIG, rngs=nnx.Rngs(0))
    model.layers.__class__ = GatedBlock
    with pytest.raises(ValueError, match=r"layers .*GatedBlock.*decode"):
        model.init_cache(B, S)
    model = NeoX(CONFIG, rngs=nnx.Rngs(0))
    model.layers.attention.__class__ = GatedNeoXAttention
    with pytest.raises(ValueError, match=r"layers\.attention .*GatedNeoXAttention.*decode"):
        model.init_cache(B, S)
    model = NeoX(CONFIG, stacked=False, rngs=nnx.Rngs(0))
    model.layers[1].ffn.dense_h_h4 = lora(D, 7)
    with pytest.raises(ValueError, match=r"ffn\.dense_h_h4 .*LoRALinear.*Linear"):
        quantize(model)
    model.layers[1].ffn = GatedFeedForward(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"ffn\.dense_h_h4 .*NoneType.*Linear"):
        quantize(model)


class ClippedSelf(SelfAttention):
    def __call__(self, h):
        return jnp.clip(super().__call__(h), -1, 1)


class ClippedCross(ChunkedCrossAttention):
    def __call__(self, h, e):
        return jnp.clip(super().__call__(h, e), -1, 1)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_retro_decodes_with_replaced_parts_or_refuses_them():
    model = retro.model()
    d = retro.SIZES["d_model"]
    model.ffw[1] = GatedFeedForward(nnx.Rngs(0), d)
    model.attn[0].norm = nnx.RMSNorm(d, rngs=nnx.Rngs(0))
    model.cca[0].query = nnx.LoRALinear(d, 12, lora_rank=2, rngs=nnx.Rngs(0))
    model.encoder.ffw[0] = GatedFeedForward(nnx.Rngs(1), d)
    model = redrawn(model)
    n = 2 * retro.L + 1
    ids, ret = token_ids(0, 2, n), retro.neighbors(1, 2, 2)
    called = jax.jit(lambda model: model(ids, ret))(model)
    cache = model.init_cache(2, n, called.dtype, neighbors=ret.shape[2:])
    decoded, _ = jax.jit(lambda model, cache: model.decode(ids, cache, model.neighbors_by_token(ret, n)))(model, cache)
    assert_close(decoded, called, 1e-10)
    model.attn[2].__class__ = ClippedSelf
    with pytest.raises(ValueError, match=r"attn\.2 .*ClippedSelf.*SelfAttention"):
        model.init_cache(2, n)
    model = retro.model()
    model.cca[1].__class__ = ClippedCross
    with pytest.raises(ValueError, match=r"cca\.1 .*ClippedCross.*ChunkedCrossAttention"):
        model.init_cache(2, n)


def test_a_feedback_model_is_not_made_from_replaced_parts():
    model = language_model("relative")
    model.encoder.layers[1].feed_forward.__class__ = GELUFeedForward
    with pytest.raises(ValueError, match=r"encoder\.layers\.1\.feed_forward .*GELUFeedForward.*FeedForward"):
        from_parallel(model)
