"""Cached decoding of GPT-NeoX against its full forward pass."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.generate import generate
from tests.common import B, S, V, assert_close, run
from tests.jaxmodels.neox.common import FORMS, START, ids, neox


def through_cache(model, cuts, start=None, max_len=S):
    """Logits [B, S, V] by position: NaN but for the last of the prefill, and all that came after."""
    prefill, decode = jax.jit(lambda m, i, c: m.prefill(i, c)), jax.jit(lambda m, i, c: m.decode(i, c))
    first, *rest = itertools.pairwise((0, *cuts, S))
    last, cache = prefill(model, ids()[:, slice(*first)], model.init_cache(B, max_len, start=start))
    logits = [jnp.full((B, first[1] - 1, V), jnp.nan), last[:, None]]
    for a, b in rest:
        more, cache = decode(model, ids()[:, a:b], cache)
        logits.append(more)
    assert int(cache.length) == S
    return jnp.concatenate(logits, axis=1)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_every_position_through_the_cache_equals_the_full_forward(x64, form, stacked):
    model = neox(stacked, **FORMS[form])
    logits = through_cache(model, range(1, S), max_len=S + 4)
    assert_close(logits, run(model, ids()))


@pytest.mark.slow
@pytest.mark.parametrize("cuts", [(S - 1,), (1, 6, 7), (4, 5, 11)])
def test_chunks_equal_the_full_forward(x64, cuts):
    model = neox(stacked=False)
    assert_close(through_cache(model, cuts)[:, cuts[0] - 1 :], run(model, ids())[:, cuts[0] - 1 :])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parallel", "sequential"])
def test_ragged_rows_through_the_cache_equal_the_full_forward(x64, form):
    model, start = neox(stacked=False, **FORMS[form]), jnp.minimum(START, 6)
    full = run(model, ids(), start)
    longest = S - int(start.min())
    for cuts in ([7, 8, 9, 10, 11, 12], [7, 11]):
        logits = through_cache(model, cuts, start, max_len=longest)
        assert_close(logits[:, 6:], full[:, 6:])
    for row in range(B):
        alone = run(model, ids()[row : row + 1, int(start[row]) :])
        assert_close(logits[row, 6:], alone[0, 6 - int(start[row]) :])


def test_prefill_computes_the_last_logits_alone():
    model = neox()
    program = jax.make_jaxpr(model.prefill)(ids(), model.init_cache(B, S))
    assert f"[{B},{S},{V}]" not in str(program)
    assert f"[{B},{S},{V}]" in str(jax.make_jaxpr(model)(ids()))


@pytest.mark.slow
def test_a_cache_may_be_kept_narrower_than_what_is_computed():
    model = neox(stacked=False)
    _, cache = model.prefill(ids()[:, :-1], model.init_cache(B, S, jnp.bfloat16))
    logits, cache = model.decode(ids()[:, -1:], cache)
    assert cache.layers[0]["key"].dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[:, 0], run(model, ids())[:, -1], atol=0.05)


@pytest.mark.slow
def test_what_does_not_fit_is_refused():
    model = neox()
    with pytest.raises(ValueError, match="max_len=0"):
        model.init_cache(B, 0)
    with pytest.raises(ValueError, match="start"):
        model.init_cache(B, S, start=START[1:])
    with pytest.raises(ValueError, match="max_len=12"):
        model.prefill(ids(), model.init_cache(B, S - 1))
    with pytest.raises(ValueError, match=r"\[B, S\]"):
        model.prefill(ids()[0], model.init_cache(B, S))
    with pytest.raises(ValueError, match="batch=5"):
        model.prefill(ids()[1:], model.init_cache(B, S))
    with pytest.raises(ValueError, match=r"start=\["):
        model.prefill(ids()[:, :12], model.init_cache(B, S, start=START))
    _, cache = model.prefill(ids(), model.init_cache(B, S))
    with pytest.raises(ValueError, match="holds"):
        model.prefill(ids()[:, :1], cache)
    with pytest.raises(ValueError, match="max_len=13"):
        model.decode(ids()[:, :1], cache)
    with pytest.raises(ValueError, match=r"\[B, S\]"):
        model.decode(ids()[:, 0], cache)


def test_inside_a_trace_what_does_not_fit_is_nan():
    model = neox(stacked=False)
    cache = model.init_cache(B, S, start=jnp.minimum(START, 1))
    _, cache = model.prefill(ids(), cache)  # row 0 is full now, the others have a slot left
    logits, _ = jax.jit(lambda cache: model.decode(ids()[:, :1], cache))(cache)
    np.testing.assert_array_equal(np.isnan(logits).all(axis=(1, 2)), np.asarray(START) == 0)
    assert jnp.isfinite(logits[1:]).all()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parallel", "tied"])
def test_generation_is_the_argmax_of_full_forwards_ragged_too(form):
    model, n, start = neox(**FORMS[form]), 4, jnp.minimum(START, 6)
    prompts, forward = ids()[:, :7], jax.jit(lambda model, ids: model(ids))
    new = generate(model, prompts, n, start=start)
    chex.assert_shape(new, (B, n))
    np.testing.assert_array_equal(generate(model.unstacked(), prompts, n, start=start), new)
    for row in range(B):
        text = prompts[row : row + 1, int(start[row]) :]
        for i in range(n):
            padded = jnp.pad(text, ((0, 0), (0, 7 + n - text.shape[1])))  # one shape for all: what follows is unseen
            assert int(new[row, i]) == int(forward(model, padded)[0, text.shape[1] - 1].argmax())
            text = jnp.concatenate([text, new[row : row + 1, i : i + 1]], axis=1)
    assert len(np.unique(new)) > 4


def test_weights_are_not_sliced_in_the_decoding_step():
    """A slice of a stacked array would be a copy of all weights for every token."""
    model = neox().unstacked()
    program = str(jax.make_jaxpr(model.decode)(ids()[:, :1], model.init_cache(B, S)))
    assert "[2,30," not in program
    stacked = neox()
    assert "[2,30," in str(jax.make_jaxpr(stacked.decode)(ids()[:, :1], stacked.init_cache(B, S)))
