"""`load_neox` on damaged checkpoints: each error names the file."""

import collections
import pickle
import re
import warnings

import numpy as np
import pytest
import torch

import jaxmodels
from jaxmodels.convert.neox import load_neox
from tests.jaxmodels.convert import originals
from tests.jaxmodels.convert.neox.test_read import edit
from tests.jaxmodels.convert.originals import layer_file, write, write_rank_files


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
