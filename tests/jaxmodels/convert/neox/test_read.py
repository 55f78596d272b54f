"""`load_neox` on checkpoints that `originals` wrote with torch alone, good and bad."""

import dataclasses
import re
import warnings

import jax
import pytest
import torch

from jaxmodels.convert import to_torch
from jaxmodels.convert.neox import load_neox
from jaxmodels.convert.neox.read import InferredWarning, ReplicaDriftWarning, open_neox
from jaxmodels.neox import NeoXConfig
from jaxmodels.weights.names import as_tensor
from tests.jaxmodels.convert import originals
from tests.jaxmodels.convert.originals import CONFIG, layer_file, write, write_rank_files

SEQUENTIAL = dataclasses.replace(CONFIG, parallel_residual=False)
TIED = dataclasses.replace(CONFIG, tied=True)


def edit(folder, layer, rank, change):
    file = layer_file(folder, layer, rank)
    tensors = torch.load(file)
    changed = change(tensors)
    torch.save(changed if isinstance(changed, dict) else tensors, file)


def assert_holds(model, state):
    """The model's tensors are these, bit for bit."""
    given = to_torch(model)
    assert given.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(as_tensor(given[name]), tensor), name
        assert as_tensor(given[name]).dtype == tensor.dtype


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("written", [write, write_rank_files])
def test_any_number_of_ranks_in_both_layouts(tmp_path, ranks, written):
    state = written(tmp_path, ranks)
    model = load_neox(tmp_path)
    assert model.settings == CONFIG
    assert_holds(model, state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("config", [CONFIG, SEQUENTIAL, TIED], ids=["parallel", "sequential", "tied"])
def test_every_dtype_and_residual(tmp_path, dtype, config):
    state = write(tmp_path, 2, config, dtype=dtype)
    model = load_neox(str(tmp_path))
    assert model.settings == config
    assert_holds(model, state)


@pytest.mark.parametrize("names", originals.NAMES)
def test_every_version_of_the_names(tmp_path, names):
    state = write(tmp_path, 2, names=names, yaml=False)
    assert_holds(load_neox(tmp_path, CONFIG), state)


def test_files_from_before_torch_had_zips(tmp_path):
    state = write(tmp_path, 3, old_format=True)
    assert_holds(load_neox(tmp_path), state)


def test_a_step_by_its_own_name_and_without_latest(tmp_path):
    state = write(tmp_path)
    assert_holds(load_neox(tmp_path / "global_step143"), state)
    (tmp_path / "latest").unlink()
    assert_holds(load_neox(tmp_path), state)
    (tmp_path / "global_step144").mkdir()
    with pytest.raises(ValueError, match="global_step143, global_step144"):
        load_neox(tmp_path)


def test_dtype_casts_and_refuses_what_does_not_fit(tmp_path):
    state = write(tmp_path, dtype=torch.float32)
    assert_holds(load_neox(tmp_path, dtype="bfloat16"), {name: t.bfloat16() for name, t in state.items()})
    with pytest.raises(ValueError, match="dtype=int8"):
        load_neox(tmp_path, dtype="int8")
    edit(tmp_path, 3, 1, lambda tensors: tensors["attention.dense.weight"].fill_(1e5))
    with pytest.raises(ValueError, match=r"layers\.1\.attention\.output\.weight\b.*float16"):
        load_neox(tmp_path, dtype="float16")


def test_float64_is_never_narrowed(tmp_path):
    state = write(tmp_path, dtype=torch.float64)
    with pytest.raises(ValueError, match="jax_enable_x64"):
        load_neox(tmp_path)
    with jax.enable_x64(True):
        assert_holds(load_neox(tmp_path), state)


# Layers, placement


def test_some_layers_in_the_order_asked_for(tmp_path):
    state = write(tmp_path)
    model = load_neox(tmp_path, layers=[2, 0])
    assert model.settings == dataclasses.replace(CONFIG, n_layers=2)
    expected = {name: tensor for name, tensor in state.items() if not name.startswith("layers.")}
    for name, tensor in state.items():
        for new, old in enumerate([2, 0]):
            if name.startswith(f"layers.{old}."):
                expected[name.replace(f"layers.{old}.", f"layers.{new}.")] = tensor
    assert_holds(model, expected)
    for layers in ([3], [0, 0], [-1], [], 1, "01", [0.0], [True], ["0"], [[0]]):
        message = rf"{re.escape(f'layers={layers!r}')} .*0 to 2\b"
        with pytest.raises(ValueError, match=message):
            load_neox(tmp_path, layers=layers)


def test_shardings_are_asked_for_every_array(tmp_path):
    state = write(tmp_path)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    asked = {}

    def shardings(path, shape):
        asked[path] = shape
        return sharding

    model = load_neox(tmp_path, shardings=shardings)
    assert_holds(model, state)
    assert asked["layers.attention.qkv_lin.kernel"] == (3, 120, 360)
    assert asked["embedding.emb.embedding"] == (84, 120)
    assert len(asked) == 16
    assert all(array.sharding == sharding for array in jax.tree.leaves(model))


# Replicas and row biases


def test_row_bias_says_how_they_merge(tmp_path):
    write(tmp_path, 2)
    name = "attention.dense.bias"
    parts = [torch.load(layer_file(tmp_path, 2, rank))[name].double() for rank in range(2)]
    expected = {
        None: parts[0] + parts[1],
        "sum": parts[0] + parts[1],
        "mean": (parts[0] + parts[1]) / 2,
        "first": parts[0],
    }
    for how, bias in expected.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            merged = to_torch(load_neox(tmp_path, row_bias=how))["layers.0.attention.output.bias"]
        assert torch.equal(as_tensor(merged), bias.half()), how
        assert [w.category for w in caught] == ([ReplicaDriftWarning] if how == "first" else [])
    with pytest.raises(ValueError, match=r"row_bias='last'.*sum, mean, first"):
        load_neox(tmp_path, row_bias="last")


def test_drifted_norms_become_the_mean_and_far_ones_warn(tmp_path):
    state = write(tmp_path, 2, dtype=torch.float32)

    def drift(by):
        def change(tensors):
            tensors["input_layernorm.weight"] = state["layers.1.pre_ln_attn.weight"] + by

        return change

    edit(tmp_path, 3, 1, drift(2e-3))
    source = open_neox(tmp_path)
    assert any(note.startswith("replicas differ by up to 0.002") for note in source.notes)
    norm = state["layers.1.pre_ln_attn.weight"]
    expected = (norm.double() + (norm + 2e-3).double()) / 2
    assert torch.equal(as_tensor(to_torch(source.model())["layers.1.pre_ln_attn.weight"]), expected.float())
    edit(tmp_path, 3, 1, drift(0.25))
    with pytest.warns(ReplicaDriftWarning, match=r"layers\.1\.pre_ln_attn\.weight by 0\.25"):
        load_neox(tmp_path)
    edit(tmp_path, 3, 1, drift(float("nan")))
    with pytest.warns(ReplicaDriftWarning, match="by nan"):
        load_neox(tmp_path)


# The vocabulary


def test_the_vocabulary_is_cut_and_padded_to_the_configuration(tmp_path):
    state = write(tmp_path, 2)
    with pytest.warns(InferredWarning, match=r"\b84 rows .*\b79; 5 "):
        cut = to_torch(load_neox(tmp_path, dataclasses.replace(CONFIG, n_vocab=79)))
    padded = to_torch(load_neox(tmp_path, dataclasses.replace(CONFIG, n_vocab=97)))
    for name in ("embedding.emb.weight", "readout.linear.weight"):
        assert torch.equal(as_tensor(cut[name]), state[name][:79])
        assert torch.equal(as_tensor(padded[name][:84]), state[name])
        assert padded[name].shape == (97, 120)
        assert not padded[name][84:].any()
    for n_vocab in (84 - 7 * 8, 84 + 7 * 8):
        message = rf"\b84 rows .*n_vocab={n_vocab}\b.*\b56\b"
        with pytest.raises(ValueError, match=message):
            load_neox(tmp_path, dataclasses.replace(CONFIG, n_vocab=n_vocab))


def test_zero_rows_at_the_end_are_padding_only_in_both_tables(tmp_path):
    write(tmp_path, 2)
    edit(tmp_path, 0, 1, lambda tensors: tensors["word_embeddings.weight"][-5:].zero_())
    assert load_neox(tmp_path).settings.n_vocab == 84
    edit(tmp_path, 6 + 1, 1, lambda tensors: tensors["final_linear.weight"][-3:].zero_())
    source = open_neox(tmp_path)
    assert source.config.n_vocab == 81
    assert any(note.startswith("3 of 84 rows") for note in source.notes)
    assert load_neox(tmp_path, CONFIG).settings.n_vocab == 84


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_readout_that_is_parallel_along_its_rows_input(tmp_path, ranks):
    """`output_layer_parallelism: row`: each rank has all tokens, for its part of the features."""
    state = write(tmp_path, ranks)
    for rank, part in enumerate(state["readout.linear.weight"].chunk(ranks, dim=1)):
        edit(tmp_path, 7, rank, lambda tensors, part=part: {"final_linear.weight": part.clone()})
    assert_holds(load_neox(tmp_path), state)
    cut = to_torch(open_neox(tmp_path, dataclasses.replace(CONFIG, n_vocab=79)).model())
    assert torch.equal(as_tensor(cut["readout.linear.weight"]), state["readout.linear.weight"][:79])


# Configurations


def test_without_yaml_the_sizes_name_a_preset(tmp_path):
    preset = NeoXConfig.pythia_14m()
    small = dataclasses.replace(preset, n_vocab=128)
    state = write(tmp_path, 2, small, yaml=False)
    source = open_neox(tmp_path)
    assert source.config == small
    assert re.search(r"pythia_14m.*n_heads=4\b", source.notes[0])
    assert source.doubts == source.notes[:1]
    with pytest.warns(InferredWarning, match=r"pythia_14m.*n_heads=4\b"):
        assert_holds(load_neox(tmp_path), state)


def test_without_yaml_and_preset_it_is_said_what_is_missing(tmp_path):
    write(tmp_path, yaml=False)
    missing = "n_heads, n_kv_heads, rope_percentage, rope_base, activation, parallel_residual, layer_norm_eps"
    with pytest.raises(ValueError, match=rf"n_layers=3, n_hidden=120, n_ff=156, tied=False, .*\).*{missing}"):
        load_neox(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_layers", 4, r"n_layers .*\b3\b.*\b4\b"),
        ("n_hidden", 240, r"n_hidden .*\b120\b.*\b240\b"),
        ("n_ff", None, r"n_ff .*\b156\b.*\b480\b"),
        ("tied", True, r"tied .*\bFalse\b.*\bTrue\b"),
        ("rope_percentage", 0.2, r"inv_freq="),
        ("rope_base", 10_000.0, r"inv_freq="),
    ],
)
def test_a_configuration_that_contradicts_the_tensors(tmp_path, field, value, message):
    write(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_neox(tmp_path, dataclasses.replace(CONFIG, **{field: value}))
