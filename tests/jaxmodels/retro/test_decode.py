"""Cached decoding of RETRO against its full forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import generate
from jaxmodels.generate import loop
from jaxmodels.retro import RetroModel
from tests.common import V, assert_close, token_ids
from tests.jaxmodels.retro.common import L, M, N, model, neighbors

B, S = 3, 15
forward = jax.jit(lambda model, x, ret=None: model(x, ret))


@jax.jit
def prefill(model, ids, cache, ret=None):
    return model.prefill(ids, cache, ret)


@jax.jit
def decode(model, ids, cache, ret=None):
    return model.decode(ids, cache, ret)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("ca_layers", "prompt"), [((1, 2), 2), ((0,), 4), ((0, 2), 9)], ids=str)
def test_decoding_equals_the_full_forward_at_every_position(ca_layers, prompt):
    retro, x, ret = model(ca_layers=ca_layers), token_ids(0, B, S), neighbors(1, B, 3)
    full, by_token = forward(retro, x, ret), retro.neighbors_by_token(ret, S)
    cache = retro.init_cache(B, S, neighbors=(N, M))
    last, cache = prefill(retro, x[:, :prompt], cache, ret[:, : prompt // L])
    assert_close(last, full[:, prompt - 1])
    for t in range(prompt, 12):
        logits, cache = decode(retro, x[:, t : t + 1], cache, by_token[:, t : t + 1])
        assert_close(logits[:, 0], full[:, t])
    assert_close(decode(retro, x[:, 12:], cache, by_token[:, 12:])[0], full[:, 12:])  # several at once


def test_the_inputs_of_a_call_are_cut_for_decoding():
    retro, ret, cuts = model(), neighbors(1, B, 3), [0, 9, 11, S]
    cache, (first, *later) = retro.decoding_inputs({"ret": ret}, cuts)
    assert cache == {"neighbors": (N, M)}
    np.testing.assert_array_equal(first["ret"], ret[:, : 9 // L])
    np.testing.assert_array_equal(later[1]["ret"], retro.neighbors_by_token(ret, S)[:, 11:S])
    assert retro.decoding_inputs({}, cuts) == ({}, [{}, {}, {}])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_rows_of_different_lengths_are_as_if_alone():
    retro, x, start = model(), token_ids(0, B, S), [0, 3, 8]
    ret = neighbors(1, B, 3)
    ragged = x.at[2, :8].set(V - 1)  # what stands in the padding does not matter
    cache = retro.init_cache(B, S, start=jnp.asarray(start), neighbors=(N, M))
    last, cache = prefill(retro, ragged[:, :9], cache, ret[:, :2])
    by_row = [retro.neighbors_by_token(ret[row : row + 1], S) for row in range(B)]
    later = jnp.stack([by_row[row][0, 9 - padding : S - padding] for row, padding in enumerate(start)])
    logits, _ = decode(retro, ragged[:, 9:], cache, later)
    for row, padding in enumerate(start):
        own = x[row : row + 1, padding:]
        alone = forward(retro, own, ret[row : row + 1, : own.shape[1] // L])[0]
        assert_close(last[row], alone[8 - padding])
        assert_close(logits[row], alone[9 - padding :])


@pytest.mark.usefixtures("x64")
def test_without_neighbors_it_decodes_as_a_plain_decoder():
    retro, x = model(), token_ids(0, B, S)
    full = forward(retro, x)
    last, cache = prefill(retro, x[:, :9], retro.init_cache(B, S))
    assert_close(last, full[:, 8])
    assert_close(decode(retro, x[:, 9:], cache)[0], full[:, 9:])


@pytest.mark.slow
def test_generate_writes_what_the_full_forward_says(monkeypatch):
    monkeypatch.setattr(loop, "MIN_SLOTS", 8)
    retro, x = model(), token_ids(0, 2, 3)
    written = generate.generate(retro, x, 9)
    text = jnp.concatenate([x, written], axis=1)
    np.testing.assert_array_equal(forward(retro, text)[:, 2:-1].argmax(-1), written)


def test_refuses_what_the_cache_was_not_made_for():
    retro, x, ret = model(), token_ids(0, B, 9), neighbors(1, B, 2)
    off, on = retro.init_cache(B, 12), retro.init_cache(B, 12, neighbors=(N, M))
    for call, match in [
        (lambda: retro.prefill(x, off, ret), r"ret .*\(2, 6\).*neighbors=None"),
        (lambda: retro.prefill(x, on), r"ret .*None.*neighbors=\(2, 6\)"),
        (lambda: retro.prefill(x, on, ret[:, :, :1]), r"\(1, 6\).*neighbors=\(2, 6\)"),
        (lambda: retro.prefill(x, on, ret[:, :1]), "C=2"),
        (lambda: retro.decode(x, on, ret), r"ret .*\[B=3, S=9, N, M\]"),
        (lambda: retro.decode(token_ids(0, B, 13), off), r"\b13 .*max_len=12\b"),
        (lambda: retro.decode(token_ids(0, 2, 3), off), r"batch=2\b.*batch=3\b"),
        (lambda: retro.init_cache(B, 0), "max_len=0"),
        (lambda: retro.init_cache(B, 5, neighbors=(0, 3)), r"neighbors=\(0, 3\)"),
        (lambda: model(ca_layers=()).init_cache(B, 5, neighbors=(2, 3)), r"neighbors=\(2, 3\).*ca_layers"),
        (lambda: RetroModel.prefill(retro, x.astype(float), off), "^ids "),
    ]:
        with pytest.raises(ValueError, match=match):
            call()
