"""Planted errors in RETRO, as a port may have them: the harness must find each one and name its place."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import torch_ref.retro
from jaxmodels import retro
from jaxmodels.attention import causal_attention
from jaxmodels.retro import attention
from parity import check

pytestmark = pytest.mark.slow
S, B, V, L = 11, 2, 13, 4


def judge():
    def build(module, **rngs):
        encoder = module.NearestNeighborEncoder(L, 1, {0}, 10, 3, 4, 7, **rngs)
        return module.RetroModel(V, 10, 1, {0}, L, 3, 4, 7, encoder, **rngs)

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    inputs = {"x": rng.integers(0, V, (B, S)), "ret": rng.integers(0, V, (B, S // L, 3, 5))}
    flax = nnx.eval_shape(lambda: build(retro, rngs=nnx.Rngs(0)))
    return check(build(torch_ref.retro), flax, inputs, steps=0)


def chunks_shifted_by_a_whole_chunk(monkeypatch):
    """Neighbors of a chunk are used from the next chunk's first token on, not from its own last token."""
    original = attention.ChunkedCrossAttention.__call__

    def call(self, h, e):
        seen = original(self, jnp.pad(h, [(0, 0), (0, 1), (0, 0)])[:, : h.shape[1]], e)
        return jnp.concatenate([h[:, :L], seen[:, L:]], axis=1)

    monkeypatch.setattr(attention.ChunkedCrossAttention, "__call__", call)


def each_neighbor_has_a_softmax_of_its_own(monkeypatch):
    original = attention.ChunkedCrossAttention.__call__

    def call(self, h, e):
        alone = [original(self, h, e[:, :, i : i + 1]) - h for i in range(e.shape[2])]
        return h + sum(alone) / len(alone)

    monkeypatch.setattr(attention.ChunkedCrossAttention, "__call__", call)


def neighbors_are_causal_too(monkeypatch):
    def call(self, h):
        return h + self.join_heads(causal_attention(*self.project(h, jnp.arange(h.shape[1]))))

    monkeypatch.setattr(attention.SelfAttention, "__call__", call)


MUTATIONS = [
    (chunks_shifted_by_a_whole_chunk, "cca.0"),
    (each_neighbor_has_a_softmax_of_its_own, "cca.0"),
    (neighbors_are_causal_too, "encoder.attn.0"),
]


PARAMETERS = [pytest.param(*mutation, id=mutation[0].__name__) for mutation in MUTATIONS]


@pytest.mark.parametrize(("mutate", "culprit"), PARAMETERS)
def test_the_harness_fails_and_names_the_culprit(monkeypatch, mutate, culprit):
    mutate(monkeypatch)
    report = judge()
    assert not report.passed
    assert report.divergence.path == culprit, str(report)
