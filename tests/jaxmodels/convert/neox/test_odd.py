"""Shards with more in them than the tensors of a model, and with tensors of other kinds."""

import os
import re

import pytest
import torch

from jaxmodels.convert.neox import load_neox
from jaxmodels.convert.neox.read import open_neox
from jaxmodels.convert.open import load
from jaxmodels.weights.lazy import read
from tests.jaxmodels.convert.neox.test_read import assert_holds
from tests.jaxmodels.convert.originals import layer_file, write, write_rank_files


def rank_files(folder):
    return sorted(folder.rglob("mp_rank_*.pt"))


def layer_files(folder):
    return sorted(folder.rglob("layer_*.pt"))


def change(file, edit, **options):
    content = torch.load(file, weights_only=False)
    torch.save(edit(content), file, **options)


def in_module(edit):
    return lambda content: content | {"module": edit(content["module"])}


OTHERS = {"module": None, "optimizer": {"state": {}}, "iteration": 143, "note": "text", "counts": torch.arange(3)}
MASKS = {"attention.bias": torch.ones(7, 7).tril()[None, None].bool(), "attention.masked_bias": torch.tensor(-1e4)}
KINDS = {
    "parameters": lambda t: torch.nn.Parameter(t),
    "strides": lambda t: t.t().contiguous().t() if t.ndim == 2 else torch.stack([t, t], -1)[..., 0],
    "wide norms": lambda t: t.float() if t.ndim == 1 else t,
}


@pytest.mark.parametrize("zip_file", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_other_kinds(tmp_path, kind, zip_file):
    write(tmp_path)
    before = open_neox(tmp_path)
    write(tmp_path / "odd")
    for file in layer_files(tmp_path / "odd"):
        change(
            file,
            lambda content: {name: KINDS[kind](tensor) for name, tensor in content.items()},
            _use_new_zipfile_serialization=zip_file,
        )
    model, expected = open_neox(tmp_path / "odd").model("float32"), before.model("float32")
    assert_holds(model, {name: torch.as_tensor(array) for name, array in held(expected).items()})


def held(model):
    from jaxmodels.convert import to_torch

    return to_torch(model)


def test_other_entries_of_layer_files(tmp_path):
    state = write(tmp_path)
    for file in layer_files(tmp_path):
        change(file, lambda content: OTHERS | content | (MASKS if "attention.dense.weight" in content else {}))
    assert_holds(load_neox(tmp_path), state)


CONTRADICT = {"attention.bias": torch.ones(1, 1, 7, 7, dtype=torch.bool), "attention.masked_bias": torch.tensor(5.0)}


@pytest.mark.parametrize("name", CONTRADICT)
def test_a_mask_that_contradicts_causal_attention_is_refused(tmp_path, name):
    write(tmp_path)
    change(layer_file(tmp_path, 3, 1), lambda held: held | {name: CONTRADICT[name]})
    with pytest.raises(ValueError, match=rf"layer_03-model_01-model_states\.pt: layers\.{name} "):
        open_neox(tmp_path)


def test_other_entries_of_rank_files(tmp_path):
    state = write_rank_files(tmp_path)
    masks = {f"sequential.3.{name}": tensor for name, tensor in MASKS.items()}
    for file in rank_files(tmp_path):
        change(file, in_module(lambda module: OTHERS | module | masks))
        change(
            file, lambda content: content | {"optimizer": {"loss": torch.ones(3)}, "lr_scheduler": None, "args": [1]}
        )
    assert_holds(load_neox(tmp_path), state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("written", [write, write_rank_files])
def test_a_prefix_is_proposed_and_removed(tmp_path, written, prefix):
    state = written(tmp_path)

    def prefixed(tensors):
        return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}

    if written is write:
        for file in layer_files(tmp_path):
            change(file, prefixed)
    else:
        for file in rank_files(tmp_path):
            change(file, in_module(prefixed))
    with pytest.raises(ValueError, match=rf"^\S*[-_]model_states\.pt: the names of all \d+ .*--strip-prefix {prefix}$"):
        open_neox(tmp_path)
    assert_holds(open_neox(tmp_path, strip_prefix=prefix).model(), state)
    with pytest.raises(ValueError, match=r"model_states\.pt .*strip_prefix='other\.'"):
        open_neox(tmp_path, strip_prefix="other.")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (0, "word_embeddings.weight"),
        (2, "mlp.dense_h_to_4h.weight"),
        (2, "attention.query_key_value.bias"),
        (2, "input_layernorm.weight"),
        (6, "norm.weight"),
        (7, "final_linear.weight"),
    ],
)
def test_a_tensor_of_another_number_of_dimensions_is_named(tmp_path, layer, name, ranks):
    write(tmp_path, ranks=ranks)
    good = torch.load(layer_file(tmp_path, layer, 0))[name]
    for other in (good.flatten()[0], good[0], good[..., None], good[..., None, None][..., :0]):
        for rank in range(ranks):
            change(layer_file(tmp_path, layer, rank), lambda content, other=other: content | {name: other.clone()})
        shape = re.escape(str(list(other.shape)))
        with pytest.raises(ValueError, match=rf"layer_0{layer}-.*: {name} has shape {shape}, expected {good.ndim} dim"):
            open_neox(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float16, 60_000.0), (torch.bfloat16, 3e38), (torch.float64, 1e308)]
)
def test_row_biases_whose_sum_overflows_are_named(tmp_path, dtype, value):
    name = "attention.dense.bias"
    write(tmp_path, dtype=dtype)
    for rank in range(2):
        change(layer_file(tmp_path, 2, rank), lambda held: held | {name: torch.full_like(held[name], value)})
    bias = open_neox(tmp_path).tensors["layers.0.attention.output.bias"]
    with pytest.raises(ValueError, match=rf"layers\.0\.attention\.output\.bias .*overflow.*{str(dtype).split('.')[1]}"):
        read(bias)
    mean = open_neox(tmp_path, row_bias="mean").tensors["layers.0.attention.output.bias"]
    assert (read(mean) == torch.tensor(value, dtype=dtype).double().numpy()).all()
    change(layer_file(tmp_path, 2, 1), lambda held: held | {name: torch.full_like(held[name], torch.inf)})
    assert (read(open_neox(tmp_path).tensors["layers.0.attention.output.bias"]) == torch.inf).all()  # as it was stored


def test_a_vocabulary_without_rows_is_named(tmp_path):
    write(tmp_path)
    for layer in (0, 7):
        for rank in range(2):
            change(layer_file(tmp_path, layer, rank), lambda held: {name: table[:0] for name, table in held.items()})
    with pytest.raises(ValueError, match=r"layer_00-model_00-model_states\.pt: the embedding has no rows"):
        open_neox(tmp_path)


def test_a_pointer_in_place_of_a_shard(tmp_path):
    write(tmp_path)
    layer_file(tmp_path, 3, 1).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises(ValueError, match=r"layer_03-model_01-model_states\.pt is a git-lfs pointer"):
        load_neox(tmp_path)


@pytest.mark.parametrize("number", ["02", "\u0662", "2" * 5_000, "+2", "2_0"])
def test_a_layer_has_one_name_in_the_files_of_ranks(tmp_path, number):
    """A second tensor for one place would take that of the first."""
    write_rank_files(tmp_path)
    name = f"sequential.{number}.attention.dense.weight"
    change(rank_files(tmp_path)[0], in_module(lambda module: module | {name: torch.ones(12, 12)}))
    with pytest.raises(ValueError, match=r"mp_rank_00_model_states\.pt has .{1,300} in its module"):
        open_neox(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, lambda file: file.symlink_to("/dev/zero")], ids=["FIFO", "device"])
@pytest.mark.parametrize(
    "name", ["latest", "config.json", "configs/vocabulary.json", "tokenizer.json", "20B_tokenizer.json"]
)
def test_a_file_that_may_be_missing_is_refused_if_it_is_no_file(tmp_path, name, make):
    write(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} is a (FIFO|device); expected a regular file"):
        load(tmp_path)
