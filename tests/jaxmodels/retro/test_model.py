"""RETRO: PyTorch twin, causality, neighbors, conversion."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import jaxmodels
from jaxmodels.convert import ConversionError, from_torch, to_torch
from jaxmodels.convert.command import main as convert
from jaxmodels.retro import NearestNeighborEncoder, RetroModel
from jaxmodels.weights.names import flat_arrays
from tests.common import V, assert_close, run, token_ids
from tests.jaxmodels.retro.common import SIZES, Flax, L, M, N, build, model, neighbors, twin

B, S = 3, 15  # three chunks and three tokens more
forward = jax.jit(lambda model, x, ret=None: model(x, ret))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("ca_layers", "encoder_ca", "s"), [((0,), (1,), L - 1), ((0, 2), (), L), ((1, 2), (0, 1), 3 * L + 2)], ids=str
)
def test_equals_its_torch_twin(ca_layers, encoder_ca, s):
    theirs = twin(ca_layers=ca_layers, encoder_ca=encoder_ca)
    ours = from_torch(nnx.eval_shape(lambda: build(Flax, ca_layers, encoder_ca, rngs=nnx.Rngs(0))), theirs.state_dict())
    x, ret = token_ids(0, B, s), neighbors(1, B, s // L)
    with torch.no_grad():
        expected = theirs(torch.tensor(np.asarray(x)), torch.tensor(np.asarray(ret)))
        without = theirs(torch.tensor(np.asarray(x)))
    assert_close(forward(ours, x, ret), expected.numpy())
    assert (s < L) == bool((expected == without).all())


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_no_logit_sees_a_later_token():
    retro, x, ret = model(), token_ids(0, B, S), neighbors(1, B, 3)
    logits = forward(retro, x, ret)
    chex.assert_shape(logits, (B, S, V))
    for t in range(S):
        changed = forward(retro, x.at[:, t].add(1) % V, ret)
        np.testing.assert_array_equal(changed[:, :t], logits[:, :t])
        assert (jnp.abs(changed[:, t:] - logits[:, t:]).max(axis=-1) > 1e-9).all()


@pytest.mark.usefixtures("x64")
def test_neighbors_of_a_chunk_first_reach_the_logits_of_its_last_token():
    retro, x, ret = model(), token_ids(0, B, S), neighbors(1, B, 3)
    logits = forward(retro, x, ret)
    for u in range(3):
        changed = forward(retro, x, ret.at[:, u, 1, M - 1].add(1) % V)
        first = (u + 1) * L - 1
        np.testing.assert_array_equal(changed[:, :first], logits[:, :first])
        assert (jnp.abs(changed[:, first:] - logits[:, first:]).max(axis=-1) > 1e-9).all()


@pytest.mark.usefixtures("x64")
def test_the_order_of_neighbors_changes_nothing_and_a_lone_one_may_be_repeated():
    retro, x, ret = model(), token_ids(0, B, S), neighbors(1, B, 3, n=3)
    logits = forward(retro, x, ret)
    assert_close(forward(retro, x, ret[:, :, jnp.array([2, 0, 1])]), logits)
    lone = ret[:, :, :1]
    assert_close(forward(retro, x, jnp.repeat(lone, 2, axis=2)), forward(retro, x, lone))


@pytest.mark.slow
@pytest.mark.parametrize("s", [L - 1, 11])
def test_without_retrieval_it_is_its_decoder_bit_for_bit(s):
    retro, x = model(), token_ids(0, B, s)
    decoder = nnx.eval_shape(lambda: build(Flax, ca_layers=(), rngs=nnx.Rngs(0)))
    own = {key: array for key, array in to_torch(retro).items() if not key.startswith(("encoder.", "cca."))}
    np.testing.assert_array_equal(forward(retro, x), forward(from_torch(decoder, own), x))


@pytest.mark.usefixtures("x64")
def test_the_originals_state_dict_loads_with_its_frequencies():
    theirs = twin()
    theta = 10_000 ** (-torch.arange(0, 4, 2).float() / 4)
    names = [*(f"attn.{i}" for i in range(3)), *(f"encoder.attn.{i}" for i in range(2))]
    original = dict(theirs.state_dict()) | {f"{name}.rotary_pe.theta": theta for name in names}
    abstract = nnx.eval_shape(lambda: build(Flax, rngs=nnx.Rngs(0)))
    loaded = from_torch(abstract, original)
    chex.assert_trees_all_equal(to_torch(loaded), {name: t.numpy() for name, t in theirs.state_dict().items()})
    theirs.load_state_dict(original)
    encoder = {name.removeprefix("encoder."): t for name, t in original.items() if name.startswith("encoder.")}
    from_torch(nnx.eval_shape(lambda: build(Flax, rngs=nnx.Rngs(0)).encoder), encoder)

    other = original | {"attn.2.rotary_pe.theta": 500 ** (-torch.arange(0, 4, 2).float() / 4)}
    for load in (lambda: from_torch(abstract, other), lambda: theirs.load_state_dict(other)):
        with pytest.raises(ValueError, match=r"attn\.2\.rotary_pe\.theta\b.*base=10000\b"):
            load()
    with pytest.raises(ConversionError, match=r"missing \(1\):\s+cca.1.norm.bias"):
        from_torch(abstract, {name: t for name, t in original.items() if name != "cca.1.norm.bias"})


def test_the_experiments_size_has_the_originals_number_of_parameters():
    def make():
        encoder = NearestNeighborEncoder(16, 6, {3}, 128, 16, 16, 512, rngs=nnx.Rngs(0))
        return RetroModel(65, 128, 6, {3, 5}, 16, 16, 16, 512, encoder, rngs=nnx.Rngs(0))

    arrays = flat_arrays(nnx.eval_shape(make))
    assert sum(array.size for array in arrays.values()) == 3_584_193
    assert {"read.kernel", "norm_e.scale", "encoder.norm_h.bias", "cca.1.query.kernel", "ffw.5.lin2.bias"} <= {
        ".".join(map(str, path)) for path in arrays
    }


@pytest.mark.parametrize("ca_layers", [(1, 2), ()], ids=str)
def test_config_and_checkpoint_give_the_model_back(ca_layers, tmp_path):
    retro = model(ca_layers=ca_layers)
    config = json.loads(json.dumps(retro.config()))
    assert config["ca_layers"] == list(ca_layers)
    jaxmodels.save(retro, tmp_path / "model")
    again = jaxmodels.load(tmp_path / "model")
    assert nnx.graphdef(again) == nnx.graphdef(retro)
    chex.assert_trees_all_equal(flat_arrays(again), flat_arrays(retro))


def test_the_command_line_converts_a_checkpoint(tmp_path):
    theirs = twin().float()
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    sizes = {**SIZES, "chunk_len": L}
    encoder = {**sizes, "n_layers": 2, "ca_layers": [0]}
    config = json.dumps({**sizes, "n_vocab": V, "n_layers": 3, "ca_layers": [1, 2], "encoder": encoder})
    files = [str(tmp_path / "model.pt"), str(tmp_path / "flax")]
    assert convert(["torch", "--model", "retro", "--config", config, *files]) == 0
    x, ret = token_ids(0, B, 9), neighbors(1, B, 2)
    with torch.no_grad():
        expected = theirs(torch.tensor(np.asarray(x)), torch.tensor(np.asarray(ret))).numpy()
    np.testing.assert_allclose(forward(jaxmodels.load(tmp_path / "flax"), x, ret), expected, atol=2e-5)


def refused(**others):
    return lambda: RetroModel(
        **{**SIZES, "n_vocab": V, "n_layers": 3, "ca_layers": (), "chunk_len": L} | others, rngs=nnx.Rngs(0)
    )


def encoder(**others):
    return NearestNeighborEncoder(
        **{**SIZES, "chunk_len": L, "n_layers": 2, "ca_layers": {0}} | others, rngs=nnx.Rngs(0)
    )


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (refused(ca_layers={3}), r"ca_layers=\[3\].*0 to 2\b"),
        (refused(ca_layers={1}), r"encoder=None, but ca_layers=\[1\]"),
        (refused(d_k=3), r"d_k=3\b"),
        (refused(n_layers=0), "n_layers=0"),
        (refused(d_model=0), "d_model=0"),
        (
            lambda: refused(ca_layers={1}, encoder=encoder(chunk_len=5))(),
            "chunk_len=4, but the encoder has chunk_len=5",
        ),
        (lambda: refused(ca_layers={1}, encoder=encoder(d_model=8))(), r"d_model=10\b.*d_model=8\b"),
        (lambda: encoder(ca_layers={-1}), r"ca_layers=\[-1\].*0 to 1\b"),
        (lambda: model()(jnp.zeros((2, 9))), r"^ids .*\[B, S\].*float"),
        (
            lambda: model()(token_ids(0, 2, 9), neighbors(0, 2, 1)),
            r"C=2, N, M\].* in 9 tokens; got int64\[2, 1, 2, 6\]|int32",
        ),
        (lambda: model()(token_ids(0, 2, 9), neighbors(0, 1, 2)), r"ret .*\[B=2, C=2"),
        (lambda: model()(token_ids(0, 2, 9), neighbors(0, 2, 2)[..., 0]), r"ret .*\[B=2, C=2"),
        (lambda: model()(token_ids(0, 2, 9), jnp.zeros((2, 2, N, M))), r"ret .*\[B=2, C=2"),
        (lambda: model()(token_ids(0, 2, 9), neighbors(0, 2, 2)[:, :, :0]), r"ret .*\[B=2, C=2"),
        (lambda: twin()(torch.zeros(2, 9, dtype=int), torch.zeros(2, 3, N, M, dtype=int)), r"C = 2\b"),
        (lambda: twin(ca_layers=(3,)), "0 to 2"),
    ],
)
def test_refuses_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_ids_outside_the_vocabulary_are_nan_not_another_tokens():
    ret = neighbors(0, 2, 2).at[0, 0, 0, 0].set(V)
    logits = run(model(), token_ids(0, 2, 9), ret)
    assert jnp.isnan(logits[0, 3:]).any()
    assert not jnp.isnan(logits[1]).any()
