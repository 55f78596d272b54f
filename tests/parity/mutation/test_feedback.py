"""Planted errors in the Feedback Transformer: the harness must find each one and name its place.

Mistakes in the equations are planted in the plain and in the fast path; mistakes that only a scan over slots can have
are planted in the fast path, and the report must name that.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import torch_ref.feedback
from jaxmodels import feedback
from jaxmodels.convert import ConversionError
from jaxmodels.feedback import attention, model, recurrence, step
from jaxmodels.layers import FeedForward, HeadProjection
from parity import check

pytestmark = pytest.mark.slow
S, B, V = 7, 3, 13


def pair(variant: str):
    def build(module, **rngs):
        return module.AutoregressiveModel(V, getattr(module, variant)(12, 3, 17, 1, **rngs), **rngs)

    torch.manual_seed(0)
    ids = np.random.default_rng(0).integers(0, V, (S + 1, B))
    return build(torch_ref.feedback), nnx.eval_shape(lambda: build(feedback, rngs=nnx.Rngs(0))), ids


def judge(variant: str):
    torch_module, flax_module, ids = pair(variant)
    return check(torch_module, flax_module, {"ids": ids[:-1]}, labels=ids[1:], steps=0)


def first_step_attends_to_nothing(monkeypatch):
    """Attention to no memory is taken for zero, but the output's bias is added."""
    original = attention.FeedbackTransformerLayer._residual

    def residual(self, x, attended, rng):
        return original(self, x, self.attn.output.bias[...] if attended is None else attended, rng)

    monkeypatch.setattr(attention.FeedbackTransformerLayer, "_residual", residual)
    attend = attention.attend

    def biased(attn, z, key, value, visible, *others):
        return attend(attn, z, key, value, visible, *others) + ~visible.any() * attn.output.bias[...]

    monkeypatch.setattr(attention, "attend", biased)


def table_row_off_by_one(monkeypatch):
    original = nnx.Param.__getitem__

    def shifted(self, index):
        if isinstance(index, slice) and index.start is not None and index.start < 0 and self.shape[0] == 2**12:
            return original(self, slice(index.start - 1, -1))
        return original(self, index)

    monkeypatch.setattr(nnx.Param, "__getitem__", shifted)
    roll_to_slots = attention.roll_to_slots
    monkeypatch.setattr(attention, "roll_to_slots", lambda scores, position: roll_to_slots(scores, position + 1))


def input_left_out_of_the_mixture(monkeypatch):
    def mix(self, states):
        return jnp.tensordot(jax.nn.softmax(self.weights[1:]), jnp.stack(states[1:]), 1)

    monkeypatch.setattr(model.Feedback, "mix", mix)


def normed_memory(monkeypatch):
    original = model.Feedback.mix
    monkeypatch.setattr(model.Feedback, "mix", lambda self, states: original(self, [states[0], *map(norm, states[1:])]))


def norm(x):
    return (x - x.mean(axis=-1, keepdims=True)) / x.std(axis=-1, keepdims=True)


def position_bias_left_out_of_the_query(monkeypatch):
    original = nnx.Param.__getitem__

    def nothing(self, index):
        return jnp.zeros(self.shape) if self.shape == (3, 4) else original(self, index)

    monkeypatch.setattr(nnx.Param, "__getitem__", nothing)
    monkeypatch.setattr(nnx.Param, "__jax_array__", lambda self: nothing(self, ...))


def memory_of_the_step_itself_is_visible(monkeypatch):
    def run_step(graphdef, weights, x, memory, t, rng, first, known=None):
        merged = nnx.merge(graphdef, *weights)
        slots = jnp.arange(recurrence.slots_of(memory))
        return step.step(merged, x, memory, (slots <= t) & (slots >= first), t, rng, known)

    monkeypatch.setattr(recurrence, "run_step", run_step)


def slots_not_rotated(monkeypatch):
    monkeypatch.setattr(attention, "roll_to_slots", lambda scores, position: scores)


def shared_value_with_a_bias(monkeypatch):
    """The bias is added, though it is in no state_dict."""
    original = model.Feedback.__init__
    call = HeadProjection.__call__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.value.biased = True

    monkeypatch.setattr(model.Feedback, "__init__", init)
    monkeypatch.setattr(HeadProjection, "__call__", lambda self, x: call(self, x) + 0.1 * hasattr(self, "biased"))


def another_activation(monkeypatch):
    monkeypatch.setattr(
        FeedForward, "__call__", lambda self, x, rng=None: self.layer2(jax.nn.gelu(self.layer1(x), approximate=False))
    )


MUTATIONS = [
    (another_activation, "transformer.layers.0.feed_forward"),
    (shared_value_with_a_bias, "transformer.value"),
    (first_step_attends_to_nothing, "transformer.layers.0"),
    (table_row_off_by_one, "transformer.layers.0.attn"),
    (position_bias_left_out_of_the_query, "transformer.layers.0.attn"),
    (input_left_out_of_the_mixture, "transformer"),
    (normed_memory, "transformer"),
    (memory_of_the_step_itself_is_visible, None),
    (slots_not_rotated, None),
]


PARAMETERS = [pytest.param(*mutation, id=mutation[0].__name__) for mutation in MUTATIONS]


@pytest.mark.parametrize(("mutate", "culprit"), PARAMETERS)
def test_the_harness_fails_and_names_the_culprit(monkeypatch, mutate, culprit):
    mutate(monkeypatch)
    report = judge(
        "FeedbackTransformer" if (culprit or "").startswith("transformer.layers") else "FeedbackTransformerKV"
    )
    assert not report.passed
    assert report.divergence.fast_path == (culprit is None), str(report)
    assert report.divergence.path == (culprit or ""), str(report)


def test_a_value_bias_in_the_shared_variant_is_refused_by_name(monkeypatch):
    original = model.Feedback.__init__

    def init(self, d_model, heads, *args, rngs, **kwargs):
        original(self, d_model, heads, *args, rngs=rngs, **kwargs)
        self.value = HeadProjection(d_model, heads, d_model // heads, bias=True, rngs=rngs)

    monkeypatch.setattr(model.Feedback, "__init__", init)
    with pytest.raises(ConversionError, match=r"missing \(1\):\s+transformer.value.linear.bias"):
        judge("FeedbackTransformerKV")


@pytest.mark.parametrize("variant", ["FeedbackTransformer", "FeedbackTransformerKV"])
def test_the_same_pairs_agree_unmutated(variant):
    report = judge(variant)
    assert report.passed, str(report)
    assert report.divergence is None
