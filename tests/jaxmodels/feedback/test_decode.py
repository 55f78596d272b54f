"""Cached decoding of the Feedback Transformer against its full forward pass."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import jaxmodels
import torch_ref.feedback
from jaxmodels import generate
from jaxmodels.convert.command import main as convert
from jaxmodels.feedback import AutoregressiveModel, FeedbackTransformer, FeedbackTransformerKV
from jaxmodels.generate import loop
from tests.common import V, assert_close, filled, run, token_ids
from tests.jaxmodels.feedback.common import SIZES, VARIANTS

S, B = 13, 3


def language_model(variant, **others):
    def make():
        return AutoregressiveModel(V, variant(**SIZES | {"n_layers": 1} | others, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))

    return filled(make, scale=0.3)


@jax.jit
def prefill(model, ids, cache):
    return model.prefill(ids, cache)


@jax.jit
def decode(model, ids, cache):
    return model.decode(ids, cache)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("memory", [None, 5], ids=["whole", "ring of 5"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_equals_the_full_forward_at_every_position(variant, memory):
    model, ids = language_model(variant, memory=memory), token_ids(0, S, B)
    full = run(model, ids)
    last, cache = prefill(model, ids[:3], model.init_cache(B, S))
    assert cache.max_len == (memory or S)
    assert_close(last, full[2])
    for t in range(3, 9):
        logits, cache = decode(model, ids[t : t + 1], cache)
        assert_close(logits[0], full[t])
    assert_close(decode(model, ids[9:], cache)[0], full[9:])  # several at once


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("memory", [None, 5], ids=["whole", "ring of 5"])
def test_rows_of_different_lengths_are_as_if_alone(memory):
    model, ids, start = language_model(FeedbackTransformerKV, memory=memory), token_ids(0, S, B), [0, 4, 7]
    ragged = jnp.asarray(ids).at[:7, 2].set(V - 1)  # what stands in the padding does not matter
    last, cache = prefill(model, ragged[:9], model.init_cache(B, S, start=jnp.asarray(start)))
    logits, _ = decode(model, ragged[9:], cache)
    for row, padding in enumerate(start):
        alone = run(model, ids[padding:, row : row + 1])[:, 0]
        assert_close(last[row], alone[8 - padding])
        assert_close(logits[:, row], alone[9 - padding :])


@pytest.mark.slow
@pytest.mark.parametrize("memory", [None, 7])
def test_the_cache_grows_with_the_text_and_changes_no_token(monkeypatch, memory):
    model, ids = language_model(FeedbackTransformer, memory=memory), token_ids(0, 3, B)
    whole = generate.generate(model, ids, 18)
    sizes = []
    original = AutoregressiveModel.decode

    def watched(self, ids, cache):
        sizes.append(cache.max_len)
        return original(self, ids, cache)

    monkeypatch.setattr(AutoregressiveModel, "decode", watched)
    monkeypatch.setattr(loop, "MIN_SLOTS", 2)
    loop.compiled.cache_clear()  # otherwise nothing is traced for a size that was compiled before
    np.testing.assert_array_equal(generate.generate(model, ids, 18), whole)
    assert list(dict.fromkeys(sizes)) == ([4, 8, 16, 32] if memory is None else [4, 7])


def test_a_limited_memory_has_no_longest_text(monkeypatch):
    monkeypatch.setattr("jaxmodels.feedback.attention.FeedbackAttention.P", 8)
    model, ids = language_model(FeedbackTransformerKV, memory=5), token_ids(0, 3, B)
    assert generate.generate(model, ids, 30).shape == (30, B)
    unlimited = language_model(FeedbackTransformerKV)
    with pytest.raises(ValueError, match=r"\b33\b.*\b8\b"):
        generate.generate(unlimited, ids, 30)


def test_refuses_what_is_not_this_models():
    model, ids = language_model(FeedbackTransformerKV), token_ids(0, S, B)
    own = language_model(FeedbackTransformer, n_layers=2)
    with pytest.raises(ValueError, match=r"\b2 layers.*\b1\b"):
        model.decode(ids, own.init_cache(B, S))
    with pytest.raises(ValueError, match="heads=3"):
        model.decode(ids, language_model(FeedbackTransformerKV, heads=2).init_cache(B, S))
    limited = language_model(FeedbackTransformerKV, memory=4)
    for reader, writer in ((model, limited), (limited, model)):
        with pytest.raises(ValueError, match=r"memory=.*memory="):
            reader.decode(ids, writer.init_cache(B, S))
    with pytest.raises(ValueError, match=r"batch=3\b.*batch=2\b"):
        model.decode(ids, model.init_cache(2, S))
    with pytest.raises(ValueError, match=r"\b13 .*max_len=12\b"):
        model.decode(ids, model.init_cache(B, 12))
    with pytest.raises(ValueError, match="max_len=0"):
        model.init_cache(B, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["feedback", "feedback_kv"])
def test_a_checkpoint_trained_in_torch_writes_the_same_text_on_both_sides(name, tmp_path):
    """From a .pt file of weights that PyTorch trained until the text is not noise, through the command line."""
    torch.manual_seed(0)
    text = torch.tensor([7, 3, 11, 3, 5, 2, 19, 3] * 6)[:, None]
    sizes = {"d_model": 8, "heads": 2, "d_ff": 16, "n_layers": 2}
    variant = getattr(torch_ref.feedback, {"feedback": "FeedbackTransformer"}.get(name, "FeedbackTransformerKV"))
    twin = torch_ref.feedback.AutoregressiveModel(V, variant(**sizes))
    optimizer = torch.optim.Adam(twin.parameters(), 0.02)
    for _ in range(25):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(twin(text[:-1])[:, 0], text[1:, 0])
        loss.backward()
        optimizer.step()
    assert loss < 1.0  # 3.1 before
    written = text[:5]
    with torch.no_grad():
        for _ in range(20):
            written = torch.cat([written, twin(written)[-1:].argmax(-1)])
    torch.save(twin.state_dict(), tmp_path / "model.pt")
    config = json.dumps({"n_vocab": V} | sizes)
    files = [str(tmp_path / "model.pt"), str(tmp_path / "flax")]
    assert convert(["torch", "--model", name, "--config", config, *files]) == 0
    new = generate.generate(jaxmodels.load(tmp_path / "flax"), jnp.asarray(text[:5].numpy()), 20)
    assert new[:, 0].tolist() == written[5:, 0].tolist()
