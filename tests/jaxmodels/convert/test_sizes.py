"""Folders whose names, configurations and indexes claim more than lies in them: refused in one short line, at once."""

import json
import re
import shutil
import time
import types

import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

import jaxmodels
from jaxmodels import models
from jaxmodels.convert.flax import write_flax
from jaxmodels.convert.hf import save_hf
from jaxmodels.convert.neox import save_neox
from jaxmodels.convert.open import open_source
from jaxmodels.convert.source import model_source
from jaxmodels.io import checkpoint
from jaxmodels.io.formats.safetensors import write_file
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.transformer import AutoregressiveTransformer

SECONDS = 5.0  # of processor time; 0.1 on an idle machine
CONFIG = NeoXConfig(n_vocab=23, n_hidden=12, n_layers=2, n_heads=3, rope_percentage=0.5, n_ff=17)
WRITERS = {
    "hf": save_hf,
    "neox": lambda model, folder: save_neox(model, folder, 1),
    "streamed": lambda model, folder: write_flax(model_source(model), folder),
    "saved": jaxmodels.save,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    model = NeoX(CONFIG, rngs=nnx.Rngs(0))
    for name, write in WRITERS.items():
        write(model, folder / name)
    plain = AutoregressiveTransformer(13, 6, 3, 7, 2, "rotary", rngs=nnx.Rngs(0))
    jaxmodels.save(plain, folder / "plain")
    return folder


@pytest.fixture
def copy(folders, tmp_path):
    def made(kind):
        return shutil.copytree(folders / kind, tmp_path / kind)

    return made


def refused(folder, pattern):
    """The folder is refused in one line of at most 700 characters, within seconds of processor time, not minutes."""
    began = time.process_time()
    with pytest.raises(ValueError, match=pattern) as error:
        jaxmodels.load(folder)
    assert time.process_time() - began < SECONDS
    assert len(str(error.value)) < 700 + len(str(folder))
    assert "\n" not in str(error.value)


HF_KEYS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
HUGE = ("3000000000", "3" + "0" * 40, "1" * 5000, "Infinity", "NaN", "true", "-3", '"' + "9" * 5000 + '"', "[" * 10**5)


@pytest.mark.parametrize("value", HUGE, ids=lambda value: value[:12])
@pytest.mark.parametrize("key", HF_KEYS)
def test_a_hugging_face_config_that_claims_too_much(copy, key, value):
    folder = copy("hf")
    file = folder / "config.json"
    file.write_text(re.sub(rf'"{key}": \d+', f'"{key}": {value}', file.read_text()))
    refused(folder, re.escape(str(file)))


@pytest.mark.parametrize("value", HUGE, ids=lambda value: value[:12])
def test_a_config_of_a_converted_model_that_claims_too_much(copy, value):
    folder = copy("streamed")
    file = folder / "config.json"
    file.write_text(re.sub(r'"n_layers": \d+', f'"n_layers": {value}', file.read_text()))
    refused(folder, re.escape(str(file)))


@pytest.mark.parametrize(("kind", "key"), [("saved", "n_layers"), ("plain", "n_layers"), ("plain", "d_ff")])
def test_a_config_of_a_saved_model_that_claims_too_much(copy, kind, key):
    folder = copy(kind)
    file = folder / "config.json"
    file.write_text(re.sub(rf'"{key}": \d+', f'"{key}": 3000000000', file.read_text()))
    refused(folder, re.escape(str(file)))


def test_layers_that_are_built_one_by_one_end_at_once(copy):
    folder = copy("saved")
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"n_layers": 2', '"n_layers": 9999999').replace("true", "false", 1))
    refused(folder, re.escape(str(file)))


@pytest.mark.parametrize("numbers", ["layer_9999999999-model_00", "layer_00-model_9999999999"])
def test_a_number_in_a_shards_name(copy, numbers):
    folder = copy("neox")
    step = next(folder.glob("global_step*"))
    norm = sorted(step.glob("layer_*"))[-2]
    shutil.copy(norm, step / f"{numbers}-model_states.pt")
    if "layer_99" in numbers:
        norm.unlink()
    refused(folder, re.escape(str(step)))


def test_a_number_of_ranks(copy):
    folder = copy("neox")
    step = next(folder.glob("global_step*"))
    for file in step.glob("layer_*"):
        file.rename(step / "mp_rank_9999999999_model_states.pt")
    refused(folder, r"lacks mp_rank_01_model_states\.pt, mp_rank_02")


@pytest.mark.parametrize(
    ("index", "pattern"),
    [
        ({"weight_map": {f"t{i}": f"model-{i:06}.safetensors" for i in range(10**5)}}, r"model-000000\.safetensors"),
        ({"weight_map": {"a": "x" * 10**6}}, r"index\.json names"),
        ({"weight_map": {"a": "../../model.safetensors"}}, r"index\.json names"),
        ({"weight_map": {"a": 10**9}}, "weight_map"),
        ({"weight_map": 10**9}, "weight_map"),
        ({"weight_map": {"x" * 10**6: "model.safetensors"}}, "config.json|tensors"),
    ],
    ids=["missing", "long", "outside", "number", "numbers", "name"],
)
def test_an_index(copy, index, pattern):
    folder = copy("hf")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    refused(folder, pattern)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rotary_pct", "1" * 5000), ("rotary_pct", ".inf"), ("rotary_pct", ".nan"), ("norm", "x" * 10**5)],
    ids=["digits", "inf", "nan", "long"],
)
def test_a_value_of_a_yaml_file(copy, key, value):
    folder = copy("neox")
    file = next(folder.rglob("*.yml"))
    file.write_text(re.sub(rf"^{key}:.*$", f"{key}: {value}", file.read_text(), flags=re.MULTILINE))
    refused(folder, re.escape(str(file)))


def test_long_names_of_tensors_are_cut(copy):
    folder = copy("hf")
    (folder / "model.safetensors").unlink()
    write_file(folder / "model.safetensors", {"x" * 10**6 + str(i): np.zeros((50, 50), np.float32) for i in range(5)})
    with pytest.raises(ValueError, match=re.escape(str(folder))) as error:
        jaxmodels.load(folder)
    assert len(str(error.value)) < 10_000


def test_a_buffer_for_each_of_many_layers_is_no_layer(copy):
    """Numbers enough for a model of that many layers, and a tensor for each, but not the tensors of a layer."""
    folder, layers = copy("hf"), 3_000
    file = folder / "config.json"
    file.write_text(re.sub(r'"num_hidden_layers": \d+', f'"num_hidden_layers": {layers}', file.read_text()))
    buffers = {f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq": np.ones(1, np.float32) for i in range(layers)}
    (folder / "model.safetensors").unlink()
    write_file(folder / "model.safetensors", buffers | {"large": np.zeros((1000, 1000), np.float32)})
    refused(folder, rf"{re.escape(str(file))} describes a model of .* in 36,004 tensors; stored are .* 3,001")


def test_orbax_arrays_that_claim_more_bytes_than_their_files_can_hold(copy, monkeypatch):
    """Tensorstore reads what is absent in its files as zeros."""
    folder = copy("plain")
    stored = ocp.metadata(folder / "params")
    claimed = types.SimpleNamespace(shape=(10**12,), dtype=np.dtype(np.float32))
    changed = types.SimpleNamespace(metadata=stored.metadata | {"generator.bias": claimed})
    monkeypatch.setattr(ocp, "metadata", lambda folder, item: changed)
    refused(folder, r"'generator.bias' has another shape than its zarr.json")
    shapes = {name: tuple(array.shape) for name, array in changed.metadata.items()}
    monkeypatch.setattr(checkpoint, "chunked_shapes", lambda folder, held: shapes)
    refused(folder, r"params is not a complete Orbax checkpoint: 4,000,000,00\d,\d+ bytes")


@jaxmodels.register("ManyBranches")
class ManyBranches(nnx.Module):
    """A class of one's own, whose argument for its depth has any name."""

    def __init__(self, branches, *, rngs):
        self.branches = branches
        self.maps = nnx.List(nnx.Linear(2, 3, rngs=rngs) for _ in range(branches))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def config(self):
        return {"branches": self.branches}


def test_a_registered_class_with_an_argument_of_any_name(tmp_path):
    model = ManyBranches(3, rngs=nnx.Rngs(0))
    jaxmodels.save(model, tmp_path / "saved")
    loaded = models.load(tmp_path / "saved")
    np.testing.assert_array_equal(loaded.maps[2].kernel[...], model.maps[2].kernel[...])
    assert type(loaded.dropout.rngs) is type(model.dropout.rngs)
    file = tmp_path / "saved" / "config.json"
    file.write_text(file.read_text().replace('"branches": 3', '"branches": 100000000'))
    refused(tmp_path / "saved", re.escape(str(file)))


def test_what_is_inspected_is_bounded_too(copy):
    folder = copy("plain")
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"n_layers": 2', '"n_layers": 1000000000'))
    assert open_source(folder).model_name == "AutoregressiveTransformer"
    from jaxmodels.command import main

    assert main(["inspect", str(folder)]) == 2
