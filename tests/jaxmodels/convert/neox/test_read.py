"""`load_neox` on checkpoints that `originals` wrote with torch alone, good and bad."""

import collections
import dataclasses
import pickle
import re
import warnings

import jax
import numpy as np
import pytest
import torch

import jaxmodels
from jaxmodels.convert import to_torch
from jaxmodels.convert.neox import load_neox
from jaxmodels.convert.neox.read import InferredWarning, ReplicaDriftWarning, open_neox
from jaxmodels.neox import NeoXConfig
from jaxmodels.weights.names import as_tensor
from tests.jaxmodels.convert import originals
from tests.jaxmodels.convert.originals import CONFIG, layer_file, write, write_rank_files

SEQUENTIAL = dataclasses.replace(CONFIG, parallel_residual=False)
TIED = dataclasses.replace(CONFIG, tied=True)


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


# Damage: each names the file


def edit(folder, layer, rank, change):
    file = layer_file(folder, layer, rank)
    tensors = torch.load(file)
    changed = change(tensors)
    torch.save(changed if isinstance(changed, dict) else tensors, file)


class Malicious:
    def __reduce__(self):
        return (eval, ("__import__('pathlib').Path('pwned').touch()",))


def malicious(folder):
    torch.save({"input_layernorm.weight": Malicious()}, layer_file(folder, 3, 1))


def malicious_old(folder):
    with layer_file(folder, 3, 1).open("wb") as stream:
        pickle.dump({"input_layernorm.weight": Malicious()}, stream, protocol=2)


def truncated(folder):
    file = layer_file(folder, 3, 1)
    file.write_bytes(file.read_bytes()[:-999])


def empty(folder):
    layer_file(folder, 3, 1).write_bytes(b"")


def no_state_dict(folder):
    torch.save([torch.zeros(3)], layer_file(folder, 3, 1))


def missing_file(folder):
    layer_file(folder, 3, 1).unlink()


def missing_rank(folder):
    for layer in (0, 2, 3, 4, 6, 7):
        layer_file(folder, layer, 1).unlink()


def missing_layer(folder):
    for rank in range(2):
        layer_file(folder, 3, rank).unlink()


def extra_layer(folder):
    for rank in range(2):
        torch.save({"a": torch.zeros(3)}, layer_file(folder, 9, rank))


def a_rank_too_many(folder):
    layer_file(folder, 3, 2).write_bytes(layer_file(folder, 3, 1).read_bytes())


def twice(folder):
    layer_file(folder, 3, 1).with_name("layer_3-model_01-model_states.pt").write_bytes(b"")


def missing_tensor(folder):
    edit(folder, 3, 1, lambda tensors: {k: v for k, v in tensors.items() if k != "mlp.dense_4h_to_h.bias"})
    edit(folder, 4, 0, lambda tensors: {k: v for k, v in tensors.items() if k != "attention.dense.weight"})


def extra_tensor(folder):
    edit(folder, 3, 1, lambda tensors: tensors | {"attention.query_norm.weight": torch.zeros(3)})


def whole_numbers(folder):
    edit(folder, 3, 1, lambda tensors: tensors | {"attention.dense.weight": torch.zeros(120, 60, dtype=torch.int8)})


def eight_bits(folder):
    edit(folder, 3, 1, lambda t: t | {"attention.dense.weight": torch.zeros(120, 60).to(torch.float8_e4m3fn)})


def quantized(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to drop them
        dense = torch.quantize_per_tensor(torch.zeros(120, 60), 0.1, 0, torch.qint8)
        edit(folder, 3, 1, lambda tensors: tensors | {"attention.dense.weight": dense})


def without_values(folder):
    edit(folder, 3, 1, lambda t: t | {"attention.dense.weight": torch.zeros(120, 60, device="meta")})


def complex_numbers(folder):
    edit(folder, 3, 1, lambda t: t | {"attention.dense.weight": torch.zeros(120, 60, dtype=torch.complex64)})


class WrongArguments:
    def __reduce__(self):
        return (collections.OrderedDict, (1, 2, 3))


def wrong_arguments(folder):
    torch.save({"input_layernorm.weight": WrongArguments()}, layer_file(folder, 3, 1))


def misshapen(folder):
    for rank in range(2):
        edit(folder, 3, rank, lambda tensors: tensors | {"attention.dense.weight": torch.zeros(120, 61).half()})


def misshapen_on_one_rank(folder):
    edit(folder, 3, 1, lambda tensors: tensors | {"attention.dense.weight": torch.zeros(120, 61).half()})


def another_dtype(folder):
    edit(folder, 3, 1, lambda tensors: tensors | {"attention.dense.weight": torch.zeros(120, 60)})


def other_frequencies(folder):
    edit(folder, 3, 1, lambda tensors: tensors | {originals.FREQUENCIES: torch.ones(2)})


def uneven_vocabulary(folder):
    for rank in range(2):
        edit(folder, 7, rank, lambda tensors: {"final_linear.weight": tensors["final_linear.weight"][:35]})


def no_norm(folder):
    for rank in range(2):
        edit(folder, 6, rank, lambda tensors: {"a": torch.zeros(3)})


def latest_to_nowhere(folder):
    (folder / "latest").write_text("global_step7")


def latest_outside(folder):
    (folder / "latest").write_text("../other")


def latest_is_binary(folder):
    (folder / "latest").write_bytes(b"\xff\xfe")


@pytest.mark.filterwarnings("ignore:TypedStorage")  # torch, of its own reading of quantized tensors
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (malicious, r"layer_03-model_01-model_states\.pt is refused.*eval"),
        (malicious_old, r"layer_03-model_01-model_states\.pt is refused"),
        (truncated, r"layer_03-model_01-model_states\.pt is"),
        (empty, r"layer_03-model_01-model_states\.pt is truncated"),
        (no_state_dict, r"layer_03-model_01-model_states\.pt .*\blist"),
        (missing_file, r"\b2 .*ranks.* layer_03-model_01-model_states\.pt"),
        (missing_rank, r"global_step143 .*n_ff .*\b78\b.*\b156\b"),
        (missing_layer, r"layer 03 .*\b06\b"),
        (extra_layer, r"layer 09\b.*\b06\b"),
        (a_rank_too_many, r"\b3 .*ranks.* layer_00-model_02-model_states\.pt"),
        (twice, r"layer_03-model_01-model_states\.pt\b"),
        (
            missing_tensor,
            r"layer_03-model_01-.*missing mlp\.dense_4h_to_h\.bias, .*layer_04-model_00-.*missing attention",
        ),
        (extra_tensor, r"layer_03-model_01-.*unexpected attention\.query_norm\.weight"),
        (whole_numbers, r"layer_03-model_01-.*missing attention\.dense\.weight"),
        (eight_bits, r"layer_03-model_01-.*'attention\.dense\.weight': a tensor of torch\.float8_e4m3fn"),
        (quantized, r"layer_03-model_01-.*quantized tensor"),
        (without_values, r"layer_03-model_01-.*'attention\.dense\.weight': a tensor of torch\.float32 on meta"),
        (complex_numbers, r"layer_03-model_01-.*missing attention\.dense\.weight"),
        (wrong_arguments, r"layer_03-model_01-"),
        (misshapen, r"layer_03-.*attention\.dense\.weight gives \[120, 122\], expected \[120, 120\]"),
        (misshapen_on_one_rank, r"layer_03-.*differs between ranks: \[120, 60\] float16, \[120, 61\] float16"),
        (another_dtype, r"layer_03-.*differs between ranks: \[120, 60\] float16, \[120, 60\] float32"),
        (other_frequencies, r"layer_03-model_01-.*inv_freq=.*base=9000\b"),
        (uneven_vocabulary, r"\b84 rows.*\b70\b"),
        (no_norm, r"global_step143 .*norm\.weight"),
        (latest_to_nowhere, "latest .*'global_step7'"),
        (latest_outside, r"latest .*'\.\./other'"),
        (latest_is_binary, "latest"),
    ],
)
def test_damage_is_one_error_that_names_the_file(tmp_path, monkeypatch, damage, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    (tmp_path.parent / "other").mkdir(exist_ok=True)
    load_neox(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        load_neox(tmp_path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["..", ".", "../other", "/", "global_step143/..", "a\\b", "a\0b", "x" * 400, "*", ""])
def test_latest_names_a_folder_beside_it(tmp_path, name):
    """`..` too is the last part of its own path."""
    write(tmp_path / "checkpoint")
    (tmp_path / "layer_00-model_00-model_states.pt").touch()
    (tmp_path / "checkpoint" / "latest").write_text(name)
    for read in (load_neox, jaxmodels.load):
        with pytest.raises(ValueError, match=r"latest names|latest .* not") as refused:
            read(tmp_path / "checkpoint")
        assert str(refused.value).isprintable()


class Evil:
    def __reduce__(self):
        return (np.lib.format.open_memmap, ("pwned", "w+", "u1", (3,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content | {"optimizer": Evil()}, "mp_rank_01_model_states.pt is refused"),
        (
            lambda content: {"model": content["module"]},
            "mp_rank_01_model_states.pt has no entry 'module'",
        ),
        (lambda content: {"module": {"word": torch.zeros(3)}}, "mp_rank_01_model_states.pt has 'word'"),
        (
            lambda content: {"module": {k: v for k, v in content["module"].items() if ".3." not in k}},
            "mp_rank_01_model_states.pt",
        ),
    ],
)
def test_damage_to_rank_files(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    write_rank_files(tmp_path)
    load_neox(tmp_path)
    file = tmp_path / "global_step143" / "mp_rank_01_model_states.pt"
    torch.save(change(torch.load(file, weights_only=False)), file)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_neox(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_a_rank_file_that_is_missing(tmp_path):
    write_rank_files(tmp_path, 3)
    (tmp_path / "global_step143" / "mp_rank_01_model_states.pt").unlink()
    with pytest.raises(ValueError, match=r"mp_rank_01_model_states\.pt"):
        load_neox(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "file", "empty"])
def test_a_folder_that_is_none(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"{name}\b"):
        load_neox(tmp_path / name)


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
