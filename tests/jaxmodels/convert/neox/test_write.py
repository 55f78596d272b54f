"""`save_neox`: the same bits at any number of ranks, and all of a checkpoint or nothing."""

import dataclasses
import resource

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx

from jaxmodels.convert.neox import load_neox, save_neox
from jaxmodels.convert.neox.layout import share, total
from jaxmodels.convert.neox.read import open_neox
from jaxmodels.convert.neox.write import write_neox
from jaxmodels.io import manifest
from jaxmodels.layers import Linear
from jaxmodels.neox import NeoX
from tests.jaxmodels.convert.neox.test_read import SEQUENTIAL, TIED, assert_holds
from tests.jaxmodels.convert.originals import CONFIG, layer_file, write


@pytest.mark.parametrize("config", [CONFIG, SEQUENTIAL, TIED], ids=["parallel", "sequential", "tied"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_from_2_ranks_to_1_to_4_to_3_to_2_keeps_every_bit(tmp_path, config, dtype):
    state = write(tmp_path / "0", 2, config, dtype=dtype)
    for i, ranks in enumerate([1, 4, 3, 2]):
        save_neox(load_neox(tmp_path / str(i)), tmp_path / str(i + 1), ranks)
        source = open_neox(tmp_path / str(i + 1))
        assert source.config == config
        assert f"of {ranks} model-parallel rank" in source.layout
    assert_holds(load_neox(tmp_path / "4"), state)


def test_what_lies_on_disk(tmp_path):
    """Read with torch alone: names, shapes, padding, shares."""
    state = write(tmp_path / "source", 3)
    write_neox(open_neox(tmp_path / "source"), tmp_path / "out", 2)
    step = tmp_path / "out" / (tmp_path / "out" / "latest").read_text()
    layers = {rank: {} for rank in range(2)}
    for file in step.glob("layer_*"):
        layers[int(file.name[15:17])][int(file.name[6:8])] = torch.load(file)
    assert sorted(layers[1]) == [0, 2, 3, 4, 6, 7]
    embedding = torch.cat([layers[rank][0]["word_embeddings.weight"] for rank in range(2)])
    assert embedding.shape == (256, 120)
    assert torch.equal(embedding[:84], state["embedding.emb.weight"])
    assert not embedding[84:].any()
    block = [layers[rank][3] for rank in range(2)]
    assert len(block[0]) == 12
    for name, ours, dim in (
        ("attention.query_key_value.weight", "attention.qkv_lin.weight", 0),
        ("attention.query_key_value.bias", "attention.qkv_lin.bias", 0),
        ("mlp.dense_4h_to_h.weight", "ffn.dense_h4_h.weight", 1),
    ):
        assert torch.equal(torch.cat([part[name] for part in block], dim), state[f"layers.1.{ours}"])
    bias = state["layers.1.ffn.dense_h4_h.bias"]
    assert all(torch.equal(part["mlp.dense_4h_to_h.bias"], bias / 2) for part in block)
    assert all(torch.equal(part["input_layernorm.bias"], state["layers.1.pre_ln_attn.bias"]) for part in block)
    rank_file = torch.load(step / "mp_rank_01_model_states.pt")
    assert rank_file["module"] == {}
    assert rank_file["mp_world_size"] == 2


@pytest.mark.parametrize("dtype", [None, "float16"], ids=["as it is", "cast"])
def test_every_byte_is_torch_s(tmp_path, dtype):
    """Files of tensors that are written from the mapped files are those of tensors in memory."""
    write(tmp_path / "source", 2, dtype=torch.float16 if dtype is None else torch.float32)
    source = open_neox(tmp_path / "source")
    write_neox(source if dtype is None else source.cast(dtype), tmp_path / "out", 4)
    files = sorted((tmp_path / "out").glob("*/layer_*"))
    assert len(files) == 4 * 6
    (tmp_path / "again").mkdir()
    for file in files:
        again = tmp_path / "again" / file.name
        torch.save(torch.load(file), again)
        assert again.read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_shares_of_a_bias_sum_to_it_again(dtype, ranks):
    """Every finite 16-bit value, the subnormal ones and -0 too; as many at random of 32 bits."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    if dtype == np.float32:
        bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    bias = bits.view(dtype)
    with np.errstate(invalid="ignore"):  # NaN
        bias = bias[np.isfinite(bias)]
    parts = [share([bias], rank, ranks) for rank in range(ranks)]
    back = total(parts)
    assert back.dtype == bias.dtype
    np.testing.assert_array_equal(back.view(bits.dtype), bias.view(bits.dtype))
    normal = np.abs(bias.astype(np.float64)) > 1e-3
    expected = bias[normal].astype(np.float64) / ranks
    for part in parts:
        np.testing.assert_allclose(part[normal].astype(np.float64), expected, rtol=ranks * 2.0**-8)


def test_a_model_with_a_list_of_layers(tmp_path):
    state = write(tmp_path / "source")
    save_neox(load_neox(tmp_path / "source").unstacked(), tmp_path / "out", 4)
    assert_holds(load_neox(tmp_path / "out"), state)


def test_more_padding_than_vocabulary(tmp_path):
    config = dataclasses.replace(CONFIG, n_vocab=5)
    state = write(tmp_path / "source", 1, config)
    write_neox(open_neox(tmp_path / "source"), tmp_path / "out", 4)
    assert_holds(load_neox(tmp_path / "out"), state)


def test_tokens_that_are_zero_are_no_padding(tmp_path):
    state = write(tmp_path / "source", 1)
    for layer, name in ((0, "word_embeddings.weight"), (7, "final_linear.weight")):
        file = layer_file(tmp_path / "source", layer, 0)
        tensors = torch.load(file)
        tensors[name][-4:] = 0
        torch.save(tensors, file)
    for name in ("embedding.emb.weight", "readout.linear.weight"):
        state[name][-4:] = 0
    save_neox(load_neox(tmp_path / "source", CONFIG), tmp_path / "out", 2)
    assert_holds(load_neox(tmp_path / "out"), state)
    assert any(note.startswith("172 of 256 rows") for note in open_neox(tmp_path / "out").notes)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"n_vocab": 257}', '{"n_vocab": 0}', '{"n_vocab": "84"}'])
def test_a_vocabulary_file_that_says_nothing(tmp_path, text):
    write(tmp_path / "source")
    save_neox(load_neox(tmp_path / "source"), tmp_path / "out", 2)
    (tmp_path / "out" / "configs" / "vocabulary.json").write_text(text)
    with pytest.raises(ValueError, match=r"vocabulary\.json .*n_vocab"):
        load_neox(tmp_path / "out")


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (5, r"n_heads=12\b.*model_parallel=5\b"),
        (0, r"model_parallel=0\b"),
        (1.5, r"model_parallel=1\.5"),
    ],
)
def test_ranks_that_do_not_fit(tmp_path, ranks, message):
    write(tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        save_neox(load_neox(tmp_path / "source"), tmp_path / "out", ranks)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_none_or_has_other_parts(tmp_path):
    with pytest.raises(ValueError, match=r"model .*\bLinear\b"):
        save_neox(Linear(3, 5, rngs=nnx.Rngs(0)), tmp_path / "out")
    model = NeoX(dataclasses.replace(CONFIG, n_layers=1), rngs=nnx.Rngs(0))
    kernel = model.layers.ffn.dense_h_h4.kernel
    model.layers.ffn.dense_h_h4.kernel = nnx.Param(jnp.zeros(kernel.shape, jnp.int8))
    with pytest.raises(ValueError, match=r"layers\.0\.ffn\.dense_h_h4\.weight .*int8"):
        save_neox(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_replaced_unasked_and_all_of_it_when_asked(tmp_path):
    write(tmp_path / "source")
    state = write(tmp_path / "original", 1)
    write_neox(open_neox(tmp_path / "original"), tmp_path / "target", 1)
    model = load_neox(tmp_path / "source")
    with pytest.raises(ValueError, match=r"\btarget\b"):
        save_neox(model, tmp_path / "target")
    assert_holds(load_neox(tmp_path / "target"), state)
    save_neox(model, tmp_path / "target", 4, overwrite=True)
    assert "of 4 model-parallel ranks" in open_neox(tmp_path / "target").layout
    assert {entry.name for entry in (tmp_path / "target").iterdir()} == {
        "latest",
        "configs",
        "global_step0",
        manifest.NAME,
    }


def test_a_checkpoint_can_take_its_own_place(tmp_path):
    state = write(tmp_path / "original", 2)
    write_neox(open_neox(tmp_path / "original"), tmp_path / "source", 2)
    write_neox(open_neox(tmp_path / "source"), tmp_path / "source", 3, overwrite=True)
    assert_holds(load_neox(tmp_path / "source"), state)


def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path):
    """The system itself refuses to let a file grow past 100 kB; a block's has 190 kB, the embedding's 30."""
    state = write(tmp_path / "original", 2)
    write_neox(open_neox(tmp_path / "original"), tmp_path / "source", 2)
    before = sorted(path.name for path in tmp_path.iterdir())
    source = open_neox(tmp_path / "source")
    with (
        limited(100_000),
        pytest.raises(OSError, match=r"too large: .*layer_02-model_00-model_states\.pt'$"),
    ):
        write_neox(source, tmp_path / "source", 1, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert_holds(load_neox(tmp_path / "source"), state)


class limited:
    """No file of this process can grow past so many bytes."""

    def __init__(self, n_bytes):
        self.n_bytes = n_bytes

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.n_bytes, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
