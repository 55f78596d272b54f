"""Long texts in segments: outputs, truncated gradients, compilation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels.feedback import AutoregressiveModel, FeedbackTransformer, FeedbackTransformerKV, segments
from jaxmodels.feedback.segments import bucket, logits_at_any_length
from jaxmodels.weights.names import flat_arrays
from tests.common import V, assert_close, filled, normal, run, token_ids
from tests.jaxmodels.feedback.common import SIZES, VARIANTS, transformer

X = jnp.ones((4, 2, 6))
M, CUTS = 5, (0, 3, 10, 17)  # segments shorter than the memory, longer, and equal in length


def in_segments(model, x, rng=None):
    state, outputs = model.init_state(x.shape[1]), []
    for begin, end in itertools.pairwise(CUTS):
        y, state = model.segment(x[begin:end], state, rng)
        outputs.append(y)
    return jnp.concatenate(outputs), state


def cut_by_hand(model, x):
    """The plain loop, with a stop in what each segment finds in the memory."""
    memories, outputs = [], []
    for begin, end in itertools.pairwise(CUTS):
        memories = jax.lax.stop_gradient(memories)
        for x_t in x[begin:end]:
            states = [x_t]
            for layer in model.layers:
                key, value = map(jnp.stack, zip(*memories[-M:], strict=True)) if memories else (None, None)
                states.append(layer(x=states[-1], key=key, value=value))
            m = model.mix(states)
            # a layer's own projections run inside the layer: what is stopped is the memory, not their kernels
            memories.append(model.remember(m))
            outputs.append(states[-1])
    return model.norm(jnp.stack(outputs))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_are_those_of_the_whole_text(variant):
    model, x = transformer(variant, memory=M, n_layers=1), normal(0, CUTS[-1], 2, 6)
    outputs, state = jax.jit(in_segments)(model, x)
    assert_close(outputs, run(model, x))
    assert int(state.length) == M


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_gradients_end_where_a_segment_begins():
    model, x = transformer(FeedbackTransformerKV, memory=M, n_layers=2), normal(0, CUTS[-1], 2, 6)
    along = normal(1, CUTS[-1], 2, 6)

    def gradients(function):
        return jax.jit(jax.grad(lambda model, x: (function(model, x) * along).sum(), (0, 1)))(model, x)

    ours, by_hand = gradients(lambda model, x: in_segments(model, x)[0]), gradients(cut_by_hand)
    whole = gradients(lambda model, x: model(x))
    assert_close(ours[1], by_hand[1])
    assert_close(flat_arrays(ours[0]), flat_arrays(by_hand[0]))
    assert jnp.abs(ours[1] - whole[1]).max() > 1e-3
    assert_close(ours[1][CUTS[-2] :], whole[1][CUTS[-2] :])  # the last segment's own inputs feel no cut


def test_segments_of_one_length_compile_once():
    model, x = transformer(FeedbackTransformerKV, memory=M, n_layers=1), normal(0, 12, 2, 6).astype(jnp.float32)
    step = jax.jit(lambda model, x, state: model.segment(x, state))
    state = model.init_state(2)
    for begin in range(0, 12, 4):
        y, state = step(model, x[begin : begin + 4], state)
    assert step._cache_size() == 1
    np.testing.assert_allclose(y, run(model, x)[8:], atol=1e-5)


def language_model(variant=FeedbackTransformerKV, **others):
    def make():
        return AutoregressiveModel(V, variant(**SIZES | {"n_layers": 1} | others, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))

    return filled(make, scale=0.3)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_language_model_in_segments():
    model, ids = language_model(memory=M), token_ids(0, 11, 2)
    state = model.init_state(2)
    first, state = model.segment(ids[:7], state)
    second, _ = model.segment(ids[7:], state)
    assert_close(jnp.concatenate([first, second]), run(model, ids))


@pytest.mark.slow
def test_lengths_change_without_compiling_for_each(monkeypatch):
    compiled = []
    monkeypatch.setattr(segments, "_logits", jax.jit(lambda model, ids: compiled.append(len(ids)) or model(ids)))
    model, ids = language_model(), token_ids(0, 13, 2)
    for n in (13, 9, 10, 12, 14 - 3, 7, 8):
        logits = logits_at_any_length(model, ids[:n])
        assert logits.shape == (n, 2, V)
    assert sorted(compiled) == [8, 12, 16]
    np.testing.assert_allclose(logits, logits_at_any_length(model, ids)[:8], atol=1e-5)


def test_buckets_are_close_enough():
    for n in range(1, 4097):
        assert n <= bucket(n) <= 1.5 * n
    assert len({bucket(n) for n in range(1, 4097)}) == 24
    assert bucket(4096) == 4096


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda model: transformer(FeedbackTransformer).init_state(2), "memory=None"),
        (lambda model: model.init_state(0), "batch=0"),
        (lambda model: model.segment(jnp.ones((4, 3, 6)), model.init_state(2)), r"batch=2\b.*batch=3\b"),
        (
            lambda model: model.segment(X, transformer(FeedbackTransformerKV, memory=4).init_state(2)),
            r"memory=4\b.*memory=5\b",
        ),
        (
            lambda model: model.segment(X, transformer(FeedbackTransformer, n_layers=2, memory=M).init_state(2)),
            r"\b2 layers.*\b1\b",
        ),
        (lambda model: model.segment(jnp.ones((4092, 2, 6)), model.init_state(2)), r"\b4092 .*\b5\b"),
        (lambda model: bucket(0), "n=0"),
    ],
)
def test_refuses(call, match):
    with pytest.raises(ValueError, match=match):
        call(transformer(FeedbackTransformerKV, memory=M, n_layers=1))
