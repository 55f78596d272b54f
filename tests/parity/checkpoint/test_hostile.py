"""`parity verify --numerics` on folders of others: transformers reads their configuration and weights, nothing else."""

import builtins
import errno
import json
import os
import pickle
import re
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from flax import nnx

import jaxmodels
from jaxmodels.convert import to_torch
from jaxmodels.convert.hf import save_hf
from jaxmodels.io import manifest
from jaxmodels.io.clean import main as clean
from jaxmodels.io.formats.safetensors import read_file, write_file
from jaxmodels.neox import NeoX, NeoXConfig
from parity.checkpoint import reference
from parity.checkpoint.gpt_neox import Transformers, alone
from parity.command import main

pytest.importorskip("transformers")
CONFIG = NeoXConfig(13, 3 * 4, 1, 3, n_ff=17, rope_percentage=0.5, max_len=7)


class Code:
    """Object whose pickle writes a file when it is read."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.fixture
def model() -> NeoX:
    return NeoX(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture
def folder(model, tmp_path) -> Path:
    save_hf(model, tmp_path / "hf")
    jaxmodels.save(model, tmp_path / "ours")
    return tmp_path / "hf"


def edit(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def assert_loaded(folder: Path, model: NeoX) -> None:
    """transformers has the weights of the model."""
    tensors = Transformers(CONFIG, str(folder)).state_dict()
    for name, expected in to_torch(model).items():
        np.testing.assert_array_equal(tensors[name].numpy(), expected)


def verify(folder: Path) -> int:
    return main(["verify", str(folder), str(folder.parent / "ours"), "--numerics", "--tokens", "5"])


def test_code_in_the_folder_neither_runs_nor_is_asked_about(folder, model, monkeypatch, capfd):
    ran = folder / "ran"
    code = f"import os\nos.mkdir({str(ran)!r})\ndef generate(*a, **k): ...\nclass Evil: ...\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "custom_generate/generate.py", "generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    (folder / "custom_generate" / "requirements.txt").write_text("evil\n")
    edit(folder, auto_map={"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"})
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("the program asks"))
    assert_loaded(folder, model)
    assert not ran.exists()
    assert capfd.readouterr() == ("", "")


def test_weights_that_transformers_prefers_are_not_read(folder, model):
    wrong = {
        name: np.full_like(np.asarray(array), 7) for name, array in read_file(folder / "model.safetensors").items()
    }
    for name in ("shard-00000-model-00001-of-00001.safetensors", "adapter_model.safetensors"):
        write_file(folder / name, wrong)
    for name in ("pytorch_model.bin", ".metadata", "tf_model.h5"):
        (folder / name).write_bytes(pickle.dumps(Code(folder / "ran")))
    assert_loaded(folder, model)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"num_labels": 10**8},
        {"fusion_config": {"evil": True}, "use_kernels": True},
        {"_attn_implementation": "nobody/kernel", "attn_implementation": "nobody/kernel"},
        {"_name_or_path": "nobody/nothing", "base_model_name_or_path": "nobody/nothing", "tp_plan": "auto"},
        {"generation_config": {"max_length": -1}, "text_config": {"model_type": "llama"}, "id2label": {"x": []}},
    ],
    ids=str,
)
def test_other_keys_of_the_configuration_have_no_effect(folder, model, values):
    assert_loaded(folder, model)  # what is imported counts as memory
    edit(folder, **values)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "max_length": "x"}')
    tracemalloc.start()
    try:
        assert_loaded(folder, model)
        assert tracemalloc.get_traced_memory()[1] < 1e8
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "values",
    [{"num_hidden_layers": 10**9}, {"hidden_size": 3 * 10**9}, {"vocab_size": 10**12}, {"intermediate_size": 10**12}],
    ids=str,
)
def test_sizes_are_compared_with_the_weights_before_a_model_is_made(folder, values, monkeypatch, capsys):
    monkeypatch.setattr(reference, "Transformers", lambda *_: pytest.fail("transformers makes a model"))
    edit(folder, **values)
    assert verify(folder) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(folder) in line


def test_a_pickle_with_code_is_refused(folder, capsys):
    (folder / "model.safetensors").unlink()
    torch.save({"gpt_neox.embed_in.weight": Code(folder / "ran")}, folder / "pytorch_model.bin")
    assert verify(folder) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(folder / "pytorch_model.bin") in line
    assert not (folder / "ran").exists()


def test_weights_of_several_files_and_in_a_subfolder_are_found(folder, model):
    file = folder / "model.safetensors"
    tensors = {name: np.asarray(array) for name, array in read_file(file).items()}
    file.unlink()
    (folder / "parts").mkdir()
    weight_map = {}
    for i, name in enumerate(sorted(tensors)):
        part = f"parts/{i % 2}.safetensors"
        weight_map[name] = part
    for part in set(weight_map.values()):
        write_file(folder / part, {name: tensors[name] for name, place in weight_map.items() if place == part})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_loaded(folder, model)


def test_names_of_tensors_are_not_printed(folder, model, capfd):
    file = folder / "model.safetensors"
    tensors = {name: np.array(array) for name, array in read_file(file).items()}
    file.unlink()
    write_file(file, tensors | {"\x1b[2J.rotary_emb.inv_freq": np.zeros(3, np.float32)})
    assert_loaded(folder, model)
    assert capfd.readouterr() == ("", "")


def test_the_folder_for_transformers_is_left_to_clean(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    entered = alone(folder)
    left = entered.__enter__()  # a process that is killed does not leave it
    (left / "other.safetensors").symlink_to(folder / "model.safetensors")

    def delete() -> None:
        for path in (left, *left.rglob("*")):
            os.utime(path, (time.time() - 2 * manifest.SETTLED,) * 2, follow_symlinks=False)
        assert clean([str(tmp_path / "temporary"), "--delete"]) == 0

    delete()
    assert left.exists()  # a link that this program has not made is in it
    (left / "other.safetensors").unlink()
    delete()
    assert "removed 1" in capsys.readouterr().out
    assert not left.exists()
    assert (folder / "model.safetensors").is_file()
    with pytest.raises(StopIteration):
        next(entered.gen)


def test_a_full_disk_under_the_folder_for_transformers_is_named(folder, monkeypatch, capsys):
    def write_text(file: Path, *args: object, **settings: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", write_text)
    assert verify(folder) == 2
    assert re.search(r"No space left on device: '.*/\.parity\.[0-9a-f]{8}/", capsys.readouterr().err)
