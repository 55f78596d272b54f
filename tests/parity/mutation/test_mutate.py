"""Planted errors: the harness must find each one and name its sub-module.

Each mutation patches one function of the Flax side, as a porting mistake would be written.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import torch_ref.rope
import torch_ref.synthesizer
import torch_ref.transformer
from jaxmodels import attention, layers, rope, synthesizer, transformer
from parity import check

pytestmark = pytest.mark.slow
S, B = 11, 3


def language_model(kind: str, n_layers: int = 1):
    args = (13, 12, 3, 17, n_layers, kind)
    torch.manual_seed(0)
    ids = np.random.default_rng(0).integers(0, 13, (S + 1, B))
    flax_module = nnx.eval_shape(lambda: transformer.AutoregressiveTransformer(*args, rngs=nnx.Rngs(0)))
    torch_module = torch_ref.transformer.AutoregressiveTransformer(*args)
    return torch_module, flax_module, {"ids": ids[:-1]}, ids[1:]


class GeluTorch(torch.nn.Module):
    """A feed-forward network with the exact GELU."""

    def __init__(self):
        super().__init__()
        self.layer1 = torch.nn.Linear(7, 29)
        self.layer2 = torch.nn.Linear(29, 7)
        self.activation = torch.nn.GELU()

    def forward(self, x):
        return self.layer2(self.activation(self.layer1(x)))


class Gelu(nnx.Module):
    def __call__(self, x):
        return jax.nn.gelu(x, approximate=False)


class GeluFlax(nnx.Module):
    def __init__(self, *, rngs):
        self.layer1 = layers.Linear(7, 29, rngs=rngs)
        self.layer2 = layers.Linear(29, 7, rngs=rngs)
        self.activation = Gelu()

    def __call__(self, x):
        return self.layer2(self.activation(self.layer1(x)))


def gelu_network():
    torch.manual_seed(0)
    return GeluTorch(), GeluFlax(rngs=nnx.Rngs(0)), {"x": np.random.default_rng(0).standard_normal((5, 3, 7))}, None


def tanh_gelu(monkeypatch):
    monkeypatch.setattr(Gelu, "__call__", lambda self, x: jax.nn.gelu(x, approximate=True))


def interleaved_pairs(monkeypatch):
    def call(self, x, positions=None, inverse=False):
        positions = jnp.arange(len(x)) if positions is None else positions
        cos, sin = rope.rotary_tables(positions, self.d, self.base, x.dtype)
        cos, sin = cos[:, None, None, :], sin[:, None, None, :]
        x1, x2 = x[..., 0 : self.d : 2], x[..., 1 : self.d : 2]
        rotated = jnp.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).reshape(*x.shape[:-1], self.d)
        return jnp.concatenate([rotated, x[..., self.d :]], axis=-1)

    monkeypatch.setattr(rope.RotaryPositionalEmbeddings, "__call__", call)


def small_epsilon(monkeypatch):
    original = layers.LayerNorm.__call__

    def call(self, x):
        self.epsilon = 1e-6
        return original(self, x)

    monkeypatch.setattr(layers.LayerNorm, "__call__", call)


def dropped_value_bias(monkeypatch):
    original = attention.Attention.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.value.unbiased = True

    def call(self, x):
        y = self.linear(x) - (self.linear.bias[...] if getattr(self, "unbiased", False) else 0)
        return y.reshape(*x.shape[:-1], self.heads, self.d_k)

    monkeypatch.setattr(attention.Attention, "__init__", init)
    monkeypatch.setattr(layers.HeadProjection, "__call__", call)


def keys_one_position_late(monkeypatch):
    def project(self, query, key, value, positions):
        query = self.query_rotary_pe(self.query(query), positions)
        later = (jnp.arange(len(key)) if positions is None else positions) + 1
        key = self.key_rotary_pe(self.key(key), later)
        return *map(attention.heads_first, (query, key)), attention.heads_first(self.value(value))

    monkeypatch.setattr(rope.RotaryPEMultiHeadAttention, "project", project)


def table_row_off_by_one(monkeypatch):
    original = attention.RelativeMultiHeadAttention.position_scores
    monkeypatch.setattr(
        attention.RelativeMultiHeadAttention,
        "position_scores",
        lambda self, query, n, first: original(self, query, n, first + 1),
    )


def softmax_over_queries(monkeypatch):
    def attend(scores, value, mask, dropout, rng):
        scores = scores if mask is None else jnp.where(mask, scores, -1e30)
        return jax.nn.softmax(scores, axis=-2) @ value

    monkeypatch.setattr(attention, "attend", attend)


def swapped_layers(monkeypatch):
    def call(self, x, mask, rng=None):
        for layer in reversed(self.layers):
            x = layer(x, mask, rng)
        return self.norm(x)

    monkeypatch.setattr(transformer.Encoder, "__call__", call)


def hidden_layer_of_width_l(monkeypatch):
    """W₁ is d -> l: only the first l of its outputs exist."""

    def call(self, x, v):
        n = x.shape[-2]
        hidden = jax.nn.relu(self.linear1(x))[..., : self.max_len]
        kernel = self.linear2.kernel[...][: self.max_len]
        return jax.nn.softmax((hidden @ kernel + self.linear2.bias[...])[..., :n], axis=-1) @ v

    monkeypatch.setattr(synthesizer.DenseSynthesizer, "__call__", call)


def unscaled_scores(monkeypatch):
    original = attention.dot_product_scores
    monkeypatch.setattr(attention, "dot_product_scores", lambda query, key, scale: original(query, key, 1.0))


def no_residual_around_feed_forward(monkeypatch):
    def residual(self, x, attended, rng):
        return self.feed_forward(self.norm_ff(x + attended))

    monkeypatch.setattr(transformer.TransformerLayer, "_residual", residual)


def values_not_rotated_back(monkeypatch):
    monkeypatch.setattr(rope.RotaryValuePEMultiHeadAttention, "restore", lambda self, x, positions: x)


def cut_after_the_softmax(monkeypatch):
    def call(self, x, v):
        n = x.shape[-2]
        logits = self.linear2(jax.nn.relu(self.linear1(x)))
        return jax.nn.softmax(logits, axis=-1)[..., :n] @ v

    monkeypatch.setattr(synthesizer.DenseSynthesizer, "__call__", call)


def dense_synthesizer():
    torch.manual_seed(0)
    x, v = np.random.default_rng(0).standard_normal((2, 3, 5, 11))
    flax_module = synthesizer.DenseSynthesizer(7, 11, rngs=nnx.Rngs(0))
    return torch_ref.synthesizer.DenseSynthesizer(7, 11), flax_module, {"x": x, "v": v}, None


ATTENTION = "encoder.layers.0.self_attn"
MUTATIONS = [
    (tanh_gelu, gelu_network, "activation"),
    (interleaved_pairs, lambda: language_model("rotary"), f"{ATTENTION}.query_rotary_pe"),
    (small_epsilon, lambda: language_model("rotary"), "encoder.layers.0.norm_self_attn"),
    (dropped_value_bias, lambda: language_model("rotary"), f"{ATTENTION}.value"),
    (keys_one_position_late, lambda: language_model("rotary"), f"{ATTENTION}.key_rotary_pe"),
    (table_row_off_by_one, lambda: language_model("relative"), ATTENTION),
    (softmax_over_queries, lambda: language_model("rotary"), ATTENTION),
    (swapped_layers, lambda: language_model("rotary", n_layers=2), "encoder"),
    (hidden_layer_of_width_l, dense_synthesizer, ""),
    (cut_after_the_softmax, dense_synthesizer, ""),
    (unscaled_scores, lambda: language_model("rotary"), ATTENTION),
    (no_residual_around_feed_forward, lambda: language_model("rotary"), "encoder.layers.0"),
    (values_not_rotated_back, lambda: language_model("rotary_value"), ATTENTION),
]


@pytest.mark.parametrize(("mutate", "make", "culprit"), MUTATIONS, ids=[m[0].__name__ for m in MUTATIONS])
def test_the_harness_fails_and_names_the_culprit(monkeypatch, mutate, make, culprit):
    mutate(monkeypatch)
    torch_module, flax_module, inputs, labels = make()
    report = check(torch_module, flax_module, inputs, labels=labels, steps=0)
    assert not report.passed
    assert report.divergence.path == culprit, str(report)
    with pytest.raises(AssertionError, match=r": DIFFERS\n"):
        report.raise_if_failed()


@pytest.mark.parametrize(
    "make",
    [gelu_network, dense_synthesizer, *[lambda kind=kind: language_model(kind) for kind in ("rotary", "rotary_value")]],
)
def test_the_same_pairs_agree_unmutated(make):
    torch_module, flax_module, inputs, labels = make()
    report = check(torch_module, flax_module, inputs, labels=labels, steps=0)
    assert report.passed, str(report)
    assert report.divergence is None
