"""Decoding by protocol: a language model of a user, whose inputs other than ids reach its cache and its calls."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import parity
from jaxmodels import layers
from jaxmodels.protocols import LanguageModel
from parity.compare.decoding import NotDecodable, decoded, decodes
from parity.compare.inputs import Inputs
from parity.golden.record import record
from tests.parity.pairs import FlaxMLP

V, D, S, B = 13, 6, 23, 3


class TorchSums(torch.nn.Module):
    """Logits of the sum of all embeddings so far, scaled at each position by `gain` and shifted in each row."""

    def __init__(self):
        super().__init__()
        self.emb = torch.nn.Embedding(V, D)
        self.head = torch.nn.Linear(D, V)

    def forward(self, ids, gain=None, shift=None):
        x = self.emb(ids).cumsum(dim=1)
        x = x if gain is None else x * gain[..., None]
        return self.head(x if shift is None else x + shift[:, None, None])


class Sums(nnx.Module):
    sequence_axis = 1

    def __init__(self, *, rngs):
        self.emb, self.head = layers.Embed(V, D, rngs=rngs), layers.Linear(D, V, rngs=rngs)

    def read(self, x, gain, shift):
        x = x if gain is None else x * gain[..., None]
        return self.head(x if shift is None else x + shift[:, None, None])

    def __call__(self, ids, gain=None, shift=None):
        return self.read(self.emb(ids).cumsum(axis=1), gain, shift)

    def init_cache(self, batch, max_len, dtype=None, start=None, shift=None):
        return jnp.zeros((batch, 1, D), dtype), None if shift is None else jnp.asarray(shift, dtype)

    def prefill(self, ids, cache, gain=None):
        logits, cache = self.decode(ids, cache, gain)
        return logits[:, -1], cache

    def decode(self, ids, cache, gain=None):
        total, shift = cache
        sums = total + self.emb(ids).cumsum(axis=1)
        return self.read(sums, gain, shift), (sums[:, -1:], shift)


class GainedSums(Sums):
    def decoding_inputs(self, inputs, cuts):
        return {}, [{"gain": inputs["gain"][:, a:b]} for a, b in itertools.pairwise(cuts)]


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    return {
        "ids": rng.integers(0, V, (B, S)),
        "gain": rng.standard_normal((B, S)),
        "shift": rng.standard_normal(B),
    }


def checked(flax_class, inputs):
    torch.manual_seed(0)
    return parity.check(TorchSums(), flax_class(rngs=nnx.Rngs(0)), inputs, steps=0)


@pytest.mark.slow
def test_inputs_reach_the_cache_by_name_and_the_calls_through_decoding_inputs(inputs):
    report = checked(GainedSums, inputs)
    assert report.passed, str(report)
    assert report.value("cached decoding", "float64") < 2
    assert checked(GainedSums, list(inputs.values())).passed, "positional inputs have the names of the parameters"


def test_a_wrong_piece_of_an_input_is_found(inputs):
    class Late(GainedSums):
        def decoding_inputs(self, inputs, cuts):
            cache, calls = super().decoding_inputs(inputs, cuts)
            return cache, [{"gain": jnp.roll(call["gain"], 1, axis=0)} for call in calls]

    assert [check.kind for check in checked(Late, inputs).checks if not check.passed] == ["cached decoding"]


def test_inputs_of_unknown_use_leave_decoding_out_and_are_named(inputs, tmp_path):
    report = checked(Sums, inputs)
    assert report.passed, str(report)
    assert report.value("cached decoding", "float64") is None
    assert "gain" in report.skipped["cached decoding"]
    found = parity.invariances(Sums(rngs=nnx.Rngs(0)), inputs, only=["cached / full"])
    assert "gain" in found.skipped["cached / full"]
    with pytest.raises(NotDecodable, match=r"Sums\b.*gain"):
        decoded(Sums(rngs=nnx.Rngs(0)), Inputs.of(inputs), jnp.float32)
    record(TorchSums(), inputs, tmp_path / "sums")
    assert "gain" in parity.replay(Sums(rngs=nnx.Rngs(0)), tmp_path / "sums").skipped["cached decoding"]


def test_a_language_model_is_known_by_its_methods():
    assert decodes(Sums(rngs=nnx.Rngs(0)))
    assert not decodes(FlaxMLP(rngs=nnx.Rngs(0)))
    assert isinstance(jax.tree.map(lambda x: x, Sums(rngs=nnx.Rngs(0))), LanguageModel)
