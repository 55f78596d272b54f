"""Ids of the Hub: downloads by huggingface_hub from a server of its endpoints, its cache, and its refusals."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import HfApi, constants

import jaxmodels
from jaxmodels.convert import hub as downloads
from jaxmodels.convert.hub import download
from jaxmodels.convert.neox.write import write_neox
from jaxmodels.convert.open import open_source
from tests.jaxmodels.convert.hub_server import commit, running
from tests.jaxmodels.convert.test_open import SIZES, assert_same
from tests.jaxmodels.tokenizer import byte_level_tokenizer

NAME = "org/tiny-neox"
ABOUT = ["config.json", "generation_config.json", "tokenizer.json"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same model in several forms, by revision."""
    base = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES, bos_token_id=0, eos_token_id=0))
    for name, options in (("one", {}), ("several", {"max_shard_size": "20KB"}), ("half", {"variant": "fp16"})):
        model.save_pretrained(base / name, **options)
        byte_level_tokenizer().save(str(base / name / "tokenizer.json"))
        (base / name / "README.md").write_text("# Model card")
    state = model.state_dict()
    torch.save(state, base / "one" / "pytorch_model.bin")
    torch.save(state, base / "one" / "training_args.bin")
    (base / "one" / "onnx").mkdir()
    (base / "one" / "onnx" / "model.onnx").write_bytes(b"onnx")
    shutil.copytree(base / "one", base / "bin")
    (base / "bin" / "model.safetensors").unlink()
    write_neox(open_source(base / "one").neox(), base / "shards", 1)
    return base


@pytest.fixture
def hub(folders, tmp_path, monkeypatch):
    """A running hub, and huggingface_hub with an empty cache that asks it."""
    with running({NAME: {"main": folders / "one", "step1": folders / "several", "bin": folders / "bin"}}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.chdir(tmp_path)
        yield hub


def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_only_files_that_are_needed(hub, folders, tmp_path):
    opened = open_source(NAME)
    assert (opened.kind, opened.name) == ("hf", NAME)
    assert opened.folder == tmp_path / "cache" / "models--org--tiny-neox" / "snapshots" / commit(NAME, "main")
    assert hub.downloaded() == [*ABOUT[:2], "model.safetensors", ABOUT[2]]
    assert_same(opened.model(), jaxmodels.load(folders / "one"))
    assert len(opened.vocabulary()) == 300
    hub.requests.clear()
    assert_same(jaxmodels.load(NAME), opened.model())
    assert hub.downloaded() == []


@pytest.mark.parametrize(
    ("revision", "weights"),
    [
        ("step1", {"model.safetensors.index.json", "model-00001-of-00009.safetensors"}),
        ("bin", {"pytorch_model.bin"}),
    ],
)
def test_other_forms_and_revisions(hub, folders, revision, weights):
    folder = download(NAME, revision)
    assert folder.name == commit(NAME, revision)
    sent = set(hub.downloaded())
    expected = {file.name for file in (folders / "several").glob("model*")} if revision == "step1" else weights
    assert sent == expected | set(ABOUT)
    assert download(NAME, commit(NAME, revision)) == folder


def test_a_variant(hub, folders):
    hub.models["org/half"] = {"main": folders / "half"}
    download("org/half", variant="fp16")
    assert "model.fp16.safetensors" in hub.downloaded()
    with pytest.raises(ValueError, match=r"org/half .*'bf16'.*variant='fp16'"):
        download("org/half", variant="bf16")


def test_shards_and_models_of_this_project(hub, folders, tmp_path):
    jaxmodels.save(jaxmodels.load(folders / "one"), tmp_path / "ours")
    hub.models |= {"org/shards": {"main": folders / "shards"}, "org/ours": {"main": tmp_path / "ours"}}
    for name, kind in (("org/shards", "neox"), ("org/ours", "model")):
        opened = open_source(name)
        assert opened.kind == kind
        assert_same(opened.model(), jaxmodels.load(folders / "one"))


def test_a_local_folder_comes_first(hub, folders):
    shutil.copytree(folders / "several", NAME)
    assert open_source(NAME).folder == Path(NAME)
    assert hub.requests == []


def test_offline_the_cache_is_used(hub, monkeypatch, tmp_path):
    folder = download(NAME)
    offline(monkeypatch)
    hub.requests.clear()
    assert download(NAME) == folder
    assert open_source(NAME).folder == folder
    assert hub.requests == []
    with pytest.raises(ValueError, match=rf"org/other .*{re.escape(str(tmp_path / 'cache'))}.*HF_HUB_OFFLINE"):
        download("org/other")
    with pytest.raises(ValueError, match=r"'step1'.*`hf download org/tiny-neox --revision step1 --local-dir"):
        download(NAME, "step1")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"tiny-neox.*HF_HUB_OFFLINE.*hf download org/tiny-neox --local-dir"):
        download(NAME)


def test_a_hub_that_cannot_be_reached(hub, monkeypatch):
    folder = download(NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert download(NAME) == folder
    with pytest.raises(
        ValueError, match=r"(?s)\Aorg/other [^\n]*127\.0\.0\.1:9 cannot be reached[^\n]*hf download[^\n]*\Z"
    ):
        download("org/other")


def test_refusals_are_one_line(hub, folders, tmp_path):
    hub.models |= {"org/gated": {"main": folders / "one"}, "org/private": {"main": folders / "one"}}
    hub.tokens |= {"org/gated": "secret", "org/private": "secret"}
    hub.gated.add("org/gated")
    expected = {
        ("org/absent", None): r"org/absent is neither a folder nor a model on the Hub .*HF_TOKEN",
        ("org/private", None): r"org/private is neither a folder nor a model on the Hub .*hf auth login",
        ("org/gated", None): r"org/gated .*gated.*hf auth login",
        (NAME, "step2"): r"org/tiny-neox .*no revision 'step2'",
    }
    for (name, revision), message in expected.items():
        with pytest.raises(ValueError, match=rf"\A{message}.*\Z"):
            download(name, revision)
    hub.failing = 503
    with pytest.raises(ValueError, match=rf"\A{NAME} .*503.*\Z"):
        download(NAME)


def test_a_download_that_breaks_off_and_is_run_again(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # between its attempts
    hub.cut.add("model.safetensors")
    with pytest.raises(ValueError, match=rf"download of {NAME} broke off .*again"):
        download(NAME)
    hub.cut.clear()
    assert open_source(NAME).kind == "hf"


def test_a_full_disk(hub, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(HfApi, "snapshot_download", full)
    with pytest.raises(OSError, match=rf"No space.*{NAME}.*HF_HUB_CACHE.*{re.escape(str(tmp_path))}"):
        download(NAME)


def test_a_token(hub, folders, monkeypatch):
    hub.models["org/gated"] = {"main": folders / "one"}
    hub.tokens["org/gated"] = "secret"
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert open_source("org/gated").kind == "hf"


def copy_with(folder, target, **config):
    shutil.copytree(folder, target)
    content = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(content))
    return target


def test_models_that_cannot_be_loaded_are_refused_before_their_weights_are_sent(hub, folders, tmp_path):
    llama = copy_with(folders / "one", tmp_path / "llama", model_type="llama")
    packed = copy_with(folders / "one", tmp_path / "packed", quantization_config={"quant_method": "gptq"})
    adapter, gguf = tmp_path / "adapter", tmp_path / "gguf"
    adapter.mkdir()
    gguf.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"})
    )
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (gguf / "model.q4.gguf").write_bytes(b"GGUF")
    hub.models |= {f"org/{path.name}": {"main": path} for path in (llama, packed, adapter, gguf)}
    for name, message in {
        "org/llama": "model_type 'llama'",
        "org/packed": "'gptq'",
        "org/adapter": "adapter weights of PEFT .*org/base",
        "org/gguf": r"org/gguf .*GGUF.*model\.q4\.gguf",
    }.items():
        with pytest.raises(ValueError, match=message):
            open_source(name)
    assert not [file for file in hub.downloaded() if not file.endswith(".json")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://huggingface.co/org/tiny-neox", "address.*ORG/NAME"),
        ("org/tiny-neox@step1", r"org/tiny-neox with revision='step1', .*--revision step1 "),
        ("tiny-neox", "tiny-neox is not a folder"),
        ("org/tiny/neox", "org/tiny/neox is not a folder"),
    ],
)
def test_what_is_no_id(hub, source, message):
    with pytest.raises(ValueError, match=message):
        open_source(source)
    assert hub.requests == []


def test_without_the_package(hub, monkeypatch):
    monkeypatch.setattr(downloads, "available", lambda module: False)
    with pytest.raises(ValueError, match=r"org/tiny-neox is not a folder.*pip install 'jaxmodels\[hub\]'"):
        open_source(NAME)


@pytest.mark.slow
def test_the_command_asks_the_endpoint_of_the_environment(hub, tmp_path):
    """In a process of its own, as constants of huggingface_hub are read from the environment when it is imported."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-m", "jaxmodels", "inspect", NAME, "--revision", "step1"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{NAME}: ")
    assert f"{tmp_path / 'home'}" in done.stdout
