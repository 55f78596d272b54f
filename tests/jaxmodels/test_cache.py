"""Decoding with a cache, for every attention: what comes out is what the full forward pass gives."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.common import ATTENTIONS, MAX_LEN, B, S, V, assert_close, language_model, token_ids

START = [0, 3, 1, 6, 2]  # left padding of the ragged rows

prefill = jax.jit(lambda model, ids, cache: model.prefill(ids, cache))
decode = jax.jit(lambda model, ids, cache: model.decode(ids, cache))


def left_padded(ids):
    """Each row moved to the right by its padding; the padding is a token like any other, so that its use would show."""
    ids = np.asarray(ids)
    return jnp.asarray(np.stack([np.append(np.full(p, V - 1), row)[:S] for p, row in zip(START, ids.T, strict=True)]).T)


@pytest.fixture(scope="module", params=ATTENTIONS)
def case(request):
    """A model, ids, and the logits of a full forward pass, in float64."""
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        model, ids = language_model(request.param), token_ids(0, S, B)
        return model, ids, jax.jit(lambda model, ids: model(ids))(model, ids)


def decode_in_chunks(model, ids, cache, chunks):
    """Logits of all ids, fed in chunks of these sizes."""
    logits = []
    for ids_of_chunk in jnp.split(ids, np.cumsum(chunks)[:-1]):
        chunk_logits, cache = decode(model, ids_of_chunk, cache)
        chex.assert_shape(chunk_logits, (*ids_of_chunk.shape, V))
        logits.append(chunk_logits)
    return jnp.concatenate(logits), cache


@pytest.mark.usefixtures("x64")
def test_prefill_and_decode_equal_the_full_forward(case):
    model, ids, full = case
    last, cache = prefill(model, ids[:5], model.init_cache(B, S + 2))
    assert_close(last, full[4])
    logits, cache = decode_in_chunks(model, ids[5:], cache, [3, 1, 3, 1])
    assert_close(logits, full[5:])
    assert int(cache.length) == S
    logits, _ = decode_in_chunks(model, ids, model.init_cache(B, S + 2), [3, 1, 3, 3, 1, 1, 1])
    assert_close(logits, full)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_ragged_rows_equal_their_unpadded_selves(case):
    model, ids, full = case
    padded, start = left_padded(ids), jnp.array(START)
    last, cache = prefill(model, padded[:9], model.init_cache(B, S, start=start))
    after_prefill, _ = decode_in_chunks(model, padded[9:], cache, [3, 1])
    from_empty, _ = decode_in_chunks(model, padded, model.init_cache(B, S, start=start), [3, 1, 3, 3, 3])
    for row, p in enumerate(START):
        assert_close(last[row], full[8 - p, row])
        assert_close(after_prefill[:, row], full[9 - p : S - p, row])
        assert_close(from_empty[p:, row], full[: S - p, row])
    chex.assert_tree_all_finite(from_empty)


@pytest.mark.usefixtures("x64")
def test_padding_is_of_no_consequence_and_takes_no_room(case):
    model, ids, full = case
    padded, start = left_padded(ids), jnp.array(START)
    unknown = jnp.where(jnp.arange(S)[:, None] < start, -1, padded)  # NaN, wherever it is read
    last, _ = prefill(model, unknown[:9], model.init_cache(B, S, start=start))
    logits, _ = decode_in_chunks(model, unknown, model.init_cache(B, S, start=start), [3, 1, 3, 3, 3])
    for row, p in enumerate(START):
        assert_close(last[row], full[8 - p, row])
        assert_close(logits[p:, row], full[: S - p, row])
    roomy = model.init_cache(B, S, start=jnp.full(B, 2))
    _, cache = decode_in_chunks(model, jnp.concatenate([padded[:2], ids]), roomy, [3] * 5)
    assert int(cache.length) == S + 2  # two of each row are padding: 13 slots hold 15 ids


def test_cache_has_the_dtype_asked_for():
    model = language_model("rotary")
    cache = model.init_cache(2, 7, jnp.bfloat16)
    assert {a.dtype for a in jax.tree.leaves(cache.layers)} == {jnp.dtype(jnp.bfloat16)}
    chex.assert_shape(jax.tree.leaves(cache.layers), (2, 3, 7, 4))
    _, cache = prefill(model, token_ids(0, 5, 2), cache)
    assert {a.dtype for a in jax.tree.leaves(cache.layers)} == {jnp.dtype(jnp.bfloat16)}
    assert {a.dtype for a in jax.tree.leaves(model.init_cache(2, 7).layers)} == {jnp.dtype(jnp.float32)}


def test_a_cache_is_not_changed_by_its_use():
    model, ids = language_model("rotary"), token_ids(0, 5, 2)
    cache = model.init_cache(2, 7)
    prefill(model, ids, cache)
    chex.assert_trees_all_equal(cache, model.init_cache(2, 7))


def test_synthesized_logits_cache_values_only():
    cache = language_model("random+dense").init_cache(2, MAX_LEN)
    assert [set(layer) for layer in cache.layers] == [{"value"}] * 2
    cache = language_model("random+vanilla").init_cache(2, MAX_LEN)
    assert [set(layer) for layer in cache.layers] == [{"key", "value"}] * 2


@pytest.fixture(scope="module")
def filled_cache():
    model = language_model("rotary")
    return model, prefill(model, token_ids(0, 5, 2), model.init_cache(2, 7))[1]


def test_refuses_more_than_fits(filled_cache):
    model, cache = filled_cache
    ids = token_ids(0, 11, 2)
    with pytest.raises(ValueError, match=r"8 tokens .*max_len=7"):
        model.decode(ids[:3], cache)
    with pytest.raises(ValueError, match=r"8 tokens .*max_len=7"):
        decode(model, ids[:8], cache)  # known even inside a trace
    with pytest.raises(ValueError, match=r"8 tokens .*max_len=7"):
        model.prefill(ids[:8], model.init_cache(2, 7))
    _, full = decode(model, ids[:2], cache)
    with pytest.raises(ValueError, match=r"8 tokens .*max_len=7"):
        model.decode(ids[:1], full)


def test_refuses_another_batch(filled_cache):
    model, cache = filled_cache
    for call in (model.decode, lambda ids, _: model.prefill(ids, model.init_cache(2, 7))):
        with pytest.raises(ValueError, match=r"batch=3\b.*batch=2\b"):
            call(token_ids(0, 1, 3), cache)


def test_refuses_to_prefill_twice(filled_cache):
    model, cache = filled_cache
    with pytest.raises(ValueError, match=r"\b5 tokens"):
        model.prefill(token_ids(0, 2, 2), cache)


@pytest.mark.parametrize("start", [[1, 2, 3], [[1, 2]], 1, [0.0, 1.0], [True, False], [-1, 0]], ids=str)
def test_refuses_a_start_that_is_no_count_by_row(start):
    with pytest.raises(ValueError, match="start"):
        language_model("rotary").init_cache(2, 7, start=jnp.array(start))


def test_refuses_to_prefill_a_row_of_padding_alone():
    model = language_model("rotary")
    cache = model.init_cache(2, 7, start=jnp.array([0, 5]))
    with pytest.raises(ValueError, match=r"start=\[0, 5\]"):
        model.prefill(token_ids(0, 5, 2), cache)


def test_an_overrun_inside_jit_is_nan():
    """No error can be raised there, and a clamped write would give plausible logits."""
    model = language_model("rotary")
    ids = token_ids(0, 7, B)
    decode, prefill = jax.jit(lambda m, i, c: m.decode(i, c)), jax.jit(lambda m, i, c: m.prefill(i, c))
    logits, cache = prefill(model, ids, model.init_cache(B, 8))
    assert jnp.isfinite(logits).all()
    logits, cache = decode(model, ids[:1], cache)
    assert jnp.isfinite(logits).all()
    assert jnp.isnan(decode(model, ids[:1], cache)[0]).all()
    assert jnp.isnan(prefill(model, ids[:1], cache)[0]).all()


@pytest.mark.parametrize(("batch", "start", "rank"), [(1, None, 3), (1, [2], 4), (B, None, 4), (B, START, 4)])
def test_packed_and_unpacked_are_inverses(batch, start, rank):
    model, ids = language_model("rotary"), token_ids(0, S, batch)
    _, cache = prefill(model, ids, model.init_cache(batch, S + 1, start=start and jnp.array(start)))
    packed = cache.packed()
    assert {array.ndim for array in jax.tree.leaves(packed.layers)} == {rank}
    chex.assert_trees_all_equal(packed.unpacked(), cache)
    expected, _ = decode(model, ids[:1], cache)
    in_a_loop = jax.jit(lambda model, ids, packed: model.decode(ids, packed.unpacked()))
    np.testing.assert_allclose(in_a_loop(model, ids[:1], packed)[0], expected, rtol=1e-5, atol=1e-5)
