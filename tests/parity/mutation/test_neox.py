"""Planted errors of a NeoX port, each written as a porter would; the harness must name its place."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import torch_ref.neox
from jaxmodels.convert.neox import layout
from jaxmodels.neox import NeoX, NeoXConfig, block, model
from jaxmodels.rope import rotary_tables
from parity import check
from parity.cases import neox as cases

pytestmark = pytest.mark.slow
CONFIG = NeoXConfig(23, 3 * 10, 1, 3, rope_percentage=0.4, n_ff=17)


def checked(wrong=None, **fields):
    """The report of a pair; `wrong`: fields of the configuration with other values on the Flax side."""
    config = dataclasses.replace(CONFIG, **fields)
    torch.manual_seed(0)
    ids = np.random.default_rng(0).integers(0, 23, (3, 8))
    flax_module = nnx.eval_shape(lambda: NeoX(dataclasses.replace(config, **(wrong or {})), rngs=nnx.Rngs(0)))
    return check(torch_ref.neox.NeoX(config), flax_module, {"ids": ids[:, :-1]}, labels=ids[:, 1:], steps=0)


@pytest.mark.parametrize(
    ("fields", "wrong", "culprit"),
    [
        ({}, {"activation": "gelu_tanh"}, "layers.0.ffn"),
        ({}, {"layer_norm_eps": 1e-6}, "layers.0.pre_ln_attn"),
        ({}, {"rope_percentage": 1.0}, "layers.0.attention"),
        ({}, {"rope_base": 9_999.0}, "layers.0.attention"),
        ({}, {"parallel_residual": False}, "layers.0"),
    ],
    ids=str,
)
def test_a_wrong_configuration_is_found_and_named(fields, wrong, culprit):
    report = checked(wrong, **fields)
    assert not report.passed
    assert report.divergence.path == culprit, str(report)


@pytest.mark.parametrize("broken", ["the ranks' row biases", "transformers' files"])
def test_a_conversion_that_changes_bits_is_an_error(monkeypatch, broken):
    if broken == "the ranks' row biases":
        monkeypatch.setitem(layout.COMBINE, "sum", layout.mean)
        make, message = cases.shards, r"2 model-parallel ranks: 4 of 28 tensors differ: .*bias"
    else:
        for kind in ("weight", "bias"):
            monkeypatch.setitem(layout.HF_NAMES, f"pre_ln_attn.{kind}", f"post_attention_layernorm.{kind}")
            monkeypatch.setitem(layout.HF_NAMES, f"pre_ln_ffn.{kind}", f"input_layernorm.{kind}")
        make, message = cases.hf_files, r"transformers: 8 of 28 tensors differ: .*pre_ln"
    with pytest.raises(ValueError, match=message):
        make(np.random.default_rng(0))


def final_norm_without_its_epsilon(monkeypatch):
    original = block.FinalNorm.__call__

    def call(self, x):
        self.ln.epsilon = 1e-6
        return original(self, x)

    monkeypatch.setattr(block.FinalNorm, "__call__", call)


def frequencies_of_the_whole_head(monkeypatch):
    """θ_i = base^(-2i/d_k) instead of base^(-2i/d), as if the rotary share only cut the table."""

    def tables(positions, d, base, dtype):
        return tuple(table[..., : d // 2] for table in rotary_tables(positions, CONFIG.d_k, base, dtype))

    monkeypatch.setattr(model, "rotary_tables", tables)


def split_without_regard_to_heads(monkeypatch):
    """All queries, then all keys, then all values, as most other models have them."""

    def project(self, x, rotary):
        parts = jnp.split(self.qkv_lin(x), 3, axis=-1)
        query, key, value = (part.reshape(*x.shape[:2], self.heads, self.d_k) for part in parts)
        return block.rotate(query, *rotary), block.rotate(key, *rotary), value

    monkeypatch.setattr(block.Attention, "project", project)


def queries_one_position_late(monkeypatch):
    original = block.Attention.project

    def project(self, x, rotary):
        late = tuple(jnp.roll(table, -1, axis=1) for table in rotary)
        return original(self, x, late)[0], *original(self, x, rotary)[1:]

    monkeypatch.setattr(block.Attention, "project", project)


def row_bias_from_one_rank_of_two(monkeypatch):
    """Each rank adds its part of the bias before the reduction: a merge that keeps the first one has half of it."""
    original = block.Linear.__call__

    def call(self, x):
        row_parallel = (self.in_features, self.out_features) in ((17, 30), (30, 30))
        return original(self, x) - (0.5 * self.bias[...] if row_parallel else 0)

    monkeypatch.setattr(block.Linear, "__call__", call)


def one_norm_for_both(monkeypatch):
    """GPT-J's parallel residual: the feed-forward network has the input of the attention."""

    def residual(self, x, attended):
        return x + (attended + self.ffn(self.pre_ln_attn(x)))

    monkeypatch.setattr(block.Block, "residual", residual)


def tied_where_it_is_not(monkeypatch):
    monkeypatch.setattr(model.NeoX, "read", lambda self, x: x @ self.embedding.emb.embedding[...].T)


MUTATIONS = {
    final_norm_without_its_epsilon: "final_norm",  # whose call sets it
    frequencies_of_the_whole_head: "layers.0.attention",
    split_without_regard_to_heads: "layers.0.attention",
    queries_one_position_late: "layers.0.attention",
    row_bias_from_one_rank_of_two: "layers.0.attention.output",
    one_norm_for_both: "layers.0",
    tied_where_it_is_not: "",
}


@pytest.mark.parametrize("mutate", MUTATIONS, ids=[mutate.__name__ for mutate in MUTATIONS])
def test_the_harness_fails_and_names_the_culprit(monkeypatch, mutate):
    mutate(monkeypatch)
    report = checked()
    assert not report.passed
    assert report.divergence.path == MUTATIONS[mutate], str(report)


def cached_keys_before_they_are_rotated(monkeypatch):
    original = block.Attention.decode

    def decode(self, x, rotary, cache, positions):
        still = (jnp.ones_like(rotary[0]), jnp.zeros_like(rotary[1]))
        y, _ = original(self, x, rotary, cache, positions)
        return y, original(self, x, still, cache, positions)[1]

    monkeypatch.setattr(block.Attention, "decode", decode)


def positions_that_restart_at_every_call(monkeypatch):
    original = model.NeoX.embed
    monkeypatch.setattr(model.NeoX, "embed", lambda self, ids, _: original(self, ids, jnp.arange(ids.shape[1])))


@pytest.mark.parametrize("mutate", [cached_keys_before_they_are_rotated, positions_that_restart_at_every_call])
def test_an_error_of_decoding_alone_is_found_there(monkeypatch, mutate):
    mutate(monkeypatch)
    report = checked()
    assert [c.kind for c in report.checks if not c.passed] == ["cached decoding"]
    assert report.divergence is None


def last_layer_skipped_by_the_scan(monkeypatch):
    original = model.NeoX.forward

    def forward(self, ids, start, plain):
        if not self.is_stacked:
            return original(self, ids, start, plain)
        return original(self.with_layers(nnx.List(self.blocks()[:-1])), ids, start, plain)

    monkeypatch.setattr(model.NeoX, "forward", forward)


def test_an_error_of_the_scan_alone_is_found_and_named(monkeypatch):
    last_layer_skipped_by_the_scan(monkeypatch)
    report = checked(n_layers=2)
    assert {"output", "parameter gradients"} <= {c.kind for c in report.checks if not c.passed}
    assert report.divergence.fast_path
    assert report.divergence.flax_type == "NeoX"


@pytest.mark.parametrize("fields", [{}, {"activation": "gelu_tanh", "parallel_residual": False, "tied": True}], ids=str)
def test_the_same_pairs_agree_unmutated(fields):
    report = checked(**fields)
    assert report.passed, str(report)
    assert report.divergence is None
