"""Folders and files that are recognized but cannot be loaded: one sentence says what each is."""

import gzip
import json
import re
import shutil
import tarfile
import tracemalloc

import peft
import pytest
import safetensors.torch
import torch
import transformers

import jaxmodels
from jaxmodels.convert.open import open_source
from tests.jaxmodels.mlp import mlp
from tests.jaxmodels.tokenizer import byte_level_tokenizer

NEOX = '{"model_type": "gpt_neox"}'
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4665f26\nsize 166029852\n"
STEP = "global_step5/"


def fill(folder, files):
    """Write files: a name or "name:content" each."""
    for file in files:
        name, _, content = file.partition(":")
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content or "x")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A small model as transformers saves it."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    sizes = {"vocab_size": 307, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 5}
    torch.manual_seed(0)
    transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes, intermediate_size=28)).save_pretrained(folder)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "empty folder"),
        (["README.md"], r"no checkpoint, but README\.md"),
        ([f"latest:{STEP[:-1]}", f"{STEP}zero_pp_rank_0_mp_rank_00_model_states.pt"], "ZeRO-3.*zero_to_fp32"),
        (["zero_pp_rank_1_mp_rank_00_model_states.pt"], "ZeRO-3.*zero_to_fp32"),
        ([f"config.json:{NEOX}", "latest:s", "s/zero_pp_rank_0_mp_rank_00_model_states.pt"], "ZeRO-3.*zero_to_fp32"),
        ([f"latest:{STEP[:-1]}", f"{STEP}zero_pp_rank_0_mp_rank_00_optim_states.pt"], "optimizer states of ZeRO alone"),
        ([f"{STEP}bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"], "optimizer states of ZeRO alone"),
        (["latest:s_universal", "s_universal/zero/embedding/fp32.pt"], "universal checkpoint of DeepSpeed"),
        ([".metadata", "__0_0.distcp", "common.pt"], r"distributed.*__0_0\.distcp.*dcp_to_torch"),
        (["latest_checkpointed_iteration.txt:7", "iter_0000007/mp_rank_00/model_optim_rng.pt"], "Megatron-LM"),
        (["model-Q4_K_M.gguf"], r"GGUF.*model-Q4_K_M\.gguf"),
        (["model.onnx"], "ONNX"),
        ([f"config.json:{NEOX}", "tf_model.h5"], "TensorFlow.*from_tf"),
        ([f"config.json:{NEOX}", "flax_model.msgpack"], "Flax.*from_flax"),
        ([f"config.json:{NEOX}"], "no weights"),
        ([f"config.json:{NEOX}", ".cache/huggingface/download/a.incomplete"], "unfinished download"),
        ([f"config.json:{NEOX}", "model.safetensors.incomplete"], "unfinished download"),
        (["config.json:{}", "model.safetensors"], "without model_type"),
        (['config.json:{"model_type": "bert"}', "modules.json"], "model_type 'bert'"),
        (["config.json:[1]"], r"config\.json holds \[1\]"),
        (["config.json:{"], r"config\.json "),
        (["model.safetensors"], r"model\.safetensors without a config\.json"),
        (["checkpoint-500/config.json", "checkpoint-1000/config.json"], "Trainer.*checkpoint-1000.*checkpoint-500"),
        ([f"a/config.json:{NEOX}", "a/model.safetensors"], r"subfolders: a \(Hugging Face\)"),
        (["model_index.json:{}"], "diffusers"),
        (["consolidated.00.pth", "params.json:{}"], r"consolidated\.00\.pth"),
        (["refs/main:abc", "blobs/abc.incomplete"], "unfinished download"),
        (["model.tar.gz"], r"archive \(model\.tar\.gz\)"),
        (["tokenizer_config.json:{}", "merges.txt"], "tokenizer and no weights"),
        ([".git/HEAD"], "git repository"),
        (['config.json:{"format": 3, "script": "train.rope", "config": {}, "sha256": ""}'], "no checkpoint yet"),
        (['config.json:{"format": 2, "model": "NeoX", "config": {}}'], "format 2"),
        (['config.json:{"format": 1, "model": "NeoX", "config": {}}'], r"no weights; expected params/"),
        (["adapter_config.json:oops"], r"adapter_config\.json"),
    ],
)
def test_folders(tmp_path, files, message):
    folder = tmp_path / "source"
    folder.mkdir()
    fill(folder, files)
    with pytest.raises(ValueError, match=rf"\A[^\n]*source[^\n]*{message}[^\n]*\Z"):
        open_source(folder)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft, of transformers
def test_an_adapter_that_peft_saved(published, tmp_path):
    base = transformers.GPTNeoXForCausalLM.from_pretrained(published)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=["query_key_value"]))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=rf"adapter weights of PEFT.*{re.escape(str(published))}"):
        jaxmodels.load(tmp_path / "adapter")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"])
def test_a_pointer_in_place_of_a_file(published, tmp_path, file):
    folder = shutil.copytree(published, tmp_path / "model")
    (folder / file).write_text(LFS)
    with pytest.raises(ValueError, match=rf"model/{re.escape(file)} is a git-lfs pointer, not the file"):
        open_source(folder)


def test_a_pointer_among_shards(tmp_path):
    fill(tmp_path, ["latest:s", f"s/layer_00-model_00-model_states.pt:{LFS}"])
    with pytest.raises(ValueError, match=r"layer_00-model_00-model_states\.pt is a git-lfs pointer, not the file"):
        open_source(tmp_path)


def test_files_that_are_not_read_may_be_pointers(published, tmp_path):
    """As after `git lfs pull --include model.safetensors`."""
    folder = shutil.copytree(published, tmp_path / "model")
    for file in ("pytorch_model.bin", "training_args.bin", "model.fp8.safetensors", "flax_model.msgpack", "notes.txt"):
        (folder / file).write_text(LFS)
    assert open_source(folder).kind == "hf"
    with pytest.raises(ValueError, match=r"model\.fp8\.safetensors is a git-lfs pointer"):
        open_source(folder, variant="fp8")


def edited(published, target, **config):
    """Copy of a folder with other settings."""
    folder = shutil.copytree(published, target)
    content = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, r"config\.json .*'llama'.*'gpt_neox'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"config\.json .*'gptq'.*quantized"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "'bitsandbytes'"),
        ({"quantization": {"group_size": 64, "bits": 4}}, r"config\.json .*group_size"),
    ],
)
def test_other_models_and_quantized_ones(published, tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        open_source(edited(published, tmp_path / "model", **config))


def test_float8_and_packed_weights(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name: t.to(torch.float8_e4m3fn) for name, t in tensors.items()}, file)
    with pytest.raises(ValueError, match=r"model\.safetensors has float8 weights \(F8_E4M3\)"):
        open_source(folder)
    safetensors.torch.save_file({name: t.double() for name, t in tensors.items()}, file)
    assert open_source(folder).kind == "hf"  # F64 is no float6
    safetensors.torch.save_file({"gpt_neox.layers.0.mlp.qweight": torch.zeros(3, 5, dtype=torch.int32)}, file)
    with pytest.raises(ValueError, match=r"model\.safetensors .*GPTQ or AWQ.*qweight"):
        open_source(folder)


def test_links_to_missing_files(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../blobs/4665f26")
    with pytest.raises(ValueError, match=r"model\.safetensors is a link to a file that is missing"):
        open_source(folder)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"link .*nowhere.*does not exist"):
        open_source(tmp_path / "link")


def test_an_orbax_folder_inside_a_model(tmp_path):
    jaxmodels.save(mlp(), tmp_path / "model")
    with pytest.raises(ValueError, match=rf"Orbax.*name the folder {re.escape(str(tmp_path / 'model'))}\Z"):
        open_source(tmp_path / "model" / "params")


def test_files(published, tmp_path):
    state = tmp_path / "state.pt"
    torch.save({"weight": torch.zeros(3)}, state)
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\0\0\0")
    with tarfile.open(tmp_path / "model.tgz", "w:gz") as archive:
        archive.add(state)
    (tmp_path / "lfs.bin").write_text(LFS)
    for path, message in {
        published / "model.safetensors": f"name the folder .*{re.escape(str(published))}",
        published / "config.json": f"name the folder .*{re.escape(str(published))}",
        state: "jaxmodels convert torch",
        tmp_path / "model.gguf": "GGUF",
        tmp_path / "model.tgz": "unpacked",
        tmp_path / "lfs.bin": "git-lfs pointer",
        tmp_path / "nowhere": "not a folder",
    }.items():
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))} .*{message}"):
            open_source(path)
    with pytest.raises(ValueError, match="source=''"):
        open_source("")


def test_an_archive_is_not_decompressed(tmp_path):
    header = tarfile.TarInfo("a")
    header.type, header.size = tarfile.XHDTYPE, 10**8  # an entry that tarfile reads as a whole to find the first file
    with gzip.open(tmp_path / "model.tgz", "wb", compresslevel=1) as file:
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(100):
            file.write(bytes(10**6))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / 'model.tgz'))} is an archive"):
            open_source(tmp_path / "model.tgz")
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()
