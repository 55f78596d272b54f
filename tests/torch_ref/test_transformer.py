"""The PyTorch transformers: names, decoding, attention."""

import numpy as np
import pytest
import torch

from tests.common import ATTENTIONS, MAX_LEN, SYNTHESIZERS, B, S, V, arguments, token_ids, torch_language_model
from torch_ref.attention import MultiHeadAttention, RelativeMultiHeadAttention
from torch_ref.rope import RotaryPositionalEmbeddings, RotaryValuePEMultiHeadAttention
from torch_ref.synthesizer import DenseSynthesizer, SynthesizerAttention
from torch_ref.transformer import AutoregressiveTransformer

LINEAR = ("weight", "bias")


def keys(attention_keys):
    """The originals' keys, as a checkpoint trained with them has."""
    layer = [
        *attention_keys,
        *(f"self_attn.{part}.{w}" for part in ("value.linear", "output") for w in LINEAR),
        *(f"{part}.{w}" for part in ("feed_forward.layer1", "feed_forward.layer2") for w in LINEAR),
        *(f"{part}.{w}" for part in ("norm_self_attn", "norm_ff") for w in LINEAR),
    ]
    return {
        "src_embed.weight",
        *(f"encoder.layers.{i}.{key}" for i in range(2) for key in layer),
        *(f"encoder.norm.{w}" for w in LINEAR),
        *(f"generator.projection.{w}" for w in LINEAR),
    }


QUERY_KEY = [f"self_attn.{part}.linear.{w}" for part in ("query", "key") for w in LINEAR]
DENSE = [f"hidden.linear.{w}" for w in LINEAR] + ["projection", "projection_bias"]
ATTENTION_KEYS = {
    "rotary": QUERY_KEY,
    "rotary_value": QUERY_KEY,
    "plain": QUERY_KEY,
    "relative": [
        "self_attn.query.linear.weight",
        "self_attn.key.linear.weight",
        *(f"self_attn.{name}" for name in ("key_pos_embeddings", "key_pos_bias", "query_pos_bias")),
    ],
    "dense": [f"self_attn.dense.{name}" for name in DENSE],
    "random": ["self_attn.random.table"],
    "fixed_random": ["self_attn.fixed_random.table"],
    "factorized_dense": [f"self_attn.factorized_dense.{f}.{n}" for f in ("factor_a", "factor_c") for n in DENSE],
    "factorized_random": ["self_attn.factorized_random.left", "self_attn.factorized_random.right"],
    "random+vanilla": ["self_attn.random.table", "self_attn.alpha", *QUERY_KEY],
}


@pytest.mark.parametrize("attention", ATTENTION_KEYS)
def test_state_dict_has_the_originals_keys(attention):
    assert set(torch_language_model(attention).state_dict()) == keys(ATTENTION_KEYS[attention])


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_decoding_equals_the_forward_pass_which_sees_no_later_token(attention):
    model, ids = torch_language_model(attention).double(), torch.tensor(np.asarray(token_ids(0, S, B)))
    full = model(ids)
    assert full.shape == (S, B, V)
    cache = model.init_cache()
    logits = torch.cat([model.decode(chunk, cache) for chunk in ids.split([5, 1, 3, 1, 3])])
    torch.testing.assert_close(logits, full, rtol=0, atol=1e-11)
    changed = ids.clone()
    changed[8] = (changed[8] + 1) % V
    later = model(changed)
    torch.testing.assert_close(later[:8], full[:8], rtol=0, atol=1e-13)
    assert (later[8:] != full[8:]).any(dim=-1).all()


@torch.no_grad()
def test_plain_attention_equals_torchs_own():
    attention = MultiHeadAttention(3, 12, 0.0).double()
    query, memory = torch.randn(5, 2, 12).double(), torch.randn(7, 2, 12).double()
    mask = torch.rand(5, 7, 2) < 0.6
    mask[:, 0] = True
    q, k, v = (x.permute(1, 2, 0, 3) for x in (attention.query(query), attention.key(memory), attention.value(memory)))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask.permute(2, 0, 1)[:, None])
    expected = attention.output(out.permute(2, 0, 1, 3).flatten(2))
    torch.testing.assert_close(attention(query=query, key=memory, value=memory, mask=mask), expected)


@torch.no_grad()
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_dense_synthesizer_softmax_is_over_its_last_axis(lead):
    layer = DenseSynthesizer(7, 5)
    x, v = torch.randn(*lead, 5, 5), torch.ones(*lead, 5, 5)
    torch.testing.assert_close(layer(x, v), v)  # weights that sum to one over the right axis


@torch.no_grad()
def test_rotary_products_depend_on_distance_alone():
    q, k = (torch.randn(1, 1, 1, 6).double().expand(11, 1, 1, 6) for _ in range(2))
    rotary = RotaryPositionalEmbeddings(6)
    scores = torch.einsum("ibhd,jbhd->ij", rotary(q), rotary(k))
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1])
    torch.testing.assert_close(rotary(q, offset=4)[:7], rotary(q)[4:])
    torch.testing.assert_close(rotary(rotary(q), inverse=True), q)


def test_rotary_tables_are_float32_in_bfloat16():
    x = torch.randn(601, 1, 1, 8).bfloat16()
    y = RotaryPositionalEmbeddings(8)(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), RotaryPositionalEmbeddings(8)(x.double()), rtol=2**-8, atol=2**-6)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MultiHeadAttention(5, 12), "d_model=12 .*heads=5"),
        (lambda: RotaryPositionalEmbeddings(7), "d=7"),
        (lambda: RotaryPositionalEmbeddings(1), "d=1"),
        (lambda: RotaryPositionalEmbeddings(6)(torch.zeros(3, 1, 1, 4)), "4 features"),
        (lambda: RotaryValuePEMultiHeadAttention(3, 30, 1.0, 0.3), "rope_value_percentage=0.3"),
        (lambda: SynthesizerAttention("sparse", 3, 12, 7), "kind='sparse'"),
        (lambda: SynthesizerAttention("factorized_dense", 3, 12, 7, factors=(2, 3)), "factors="),
        (lambda: DenseSynthesizer(7, 5)(torch.zeros(8, 5), torch.zeros(8, 5)), "max_len=7"),
        (lambda: AutoregressiveTransformer(**arguments("rotary") | {"attention": "sparse"}), "max_len"),
    ],
)
def test_refuses_bad_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("attention", ["relative", *SYNTHESIZERS])
def test_refuses_more_tokens_than_the_tables_reach(attention, monkeypatch):
    monkeypatch.setattr(RelativeMultiHeadAttention, "P", MAX_LEN)
    model, ids = torch_language_model(attention), torch.zeros(MAX_LEN + 1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"{MAX_LEN + 1} .*{MAX_LEN}"):
        model(ids)
    cache = model.init_cache()
    model.decode(ids[:-1], cache)
    with pytest.raises(ValueError, match=f"{MAX_LEN + 1} .*{MAX_LEN}"):
        model.decode(ids[-1:], cache)
