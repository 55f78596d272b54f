"""Folders and files that are recognized but cannot be loaded: what each is, and what to do, in one sentence."""

import fnmatch
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmodels.convert.companions import TOKENIZER
from jaxmodels.io.bounded import CONFIG_BYTES, parsed, read_bytes, read_object, refuse_special
from jaxmodels.io.content import COMPRESSED, HEAD, POINTERS, is_zip
from jaxmodels.io.pretrained import chosen
from jaxmodels.process.paths import is_plain, walk
from jaxmodels.process.texts import quoted

HF_WEIGHTS = (
    "model*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
)
MODEL_TYPE = "gpt_neox"
EXPECTED = (
    "a model folder of jaxmodels.save, a training run, GPT-NeoX shards (`latest` and global_step*/), or a Hugging Face "
    "folder (config.json with model.safetensors or pytorch_model.bin)"
)
MOST_FILES = 10_000  # that are looked at in a folder without a checkpoint
POINTER_BYTES = 2_000  # pointers and error texts are no longer
FROM_HUB = "get the model's safetensors instead"
ZERO3 = (
    "is a ZeRO-3 checkpoint, which splits each tensor over data-parallel ranks: merge it with DeepSpeed's "
    "`python -m deepspeed.utils.zero_to_fp32 FOLDER OUT` (zero_to_fp32.py), and add the model's config.json"
)
# What a folder is that has such a file and no weights that can be loaded.
SIGNS: tuple[tuple[str, str], ...] = (
    ("*.incomplete", "holds an unfinished download ({found}): run `hf download` again"),
    (".cache/huggingface/download/*.incomplete", "holds an unfinished download: run `hf download` again"),
    ("blobs/*.incomplete", "holds an unfinished download: run `hf download` again"),
    ("zero_pp_rank_*_model_states.pt", ZERO3),
    ("*/zero_pp_rank_*_model_states.pt", ZERO3),
    ("*.gguf", f"holds weights in GGUF, the format of llama.cpp ({{found}}), which is not supported: {FROM_HUB}"),
    ("ggml*.bin", f"holds weights in ggml, the format of llama.cpp ({{found}}), which is not supported: {FROM_HUB}"),
    ("*.onnx", f"holds an ONNX model ({{found}}), which is not supported: {FROM_HUB}"),
    ("onnx/*.onnx", f"holds an ONNX model ({{found}}), which is not supported: {FROM_HUB}"),
    (
        "tf_model*.h5",
        "holds TensorFlow weights ({found}), which are not supported: convert them with transformers 4, "
        "GPTNeoXForCausalLM.from_pretrained(FOLDER, from_tf=True).save_pretrained(OUT)",
    ),
    (
        "flax_model*.msgpack",
        "holds transformers' Flax weights ({found}), which are not supported: convert them with transformers 4, "
        "GPTNeoXForCausalLM.from_pretrained(FOLDER, from_flax=True).save_pretrained(OUT)",
    ),
    ("saved_model.pb", "is a TensorFlow SavedModel, which is not supported"),
    ("*.ckpt.index", "is a TensorFlow checkpoint ({found}), which is not supported"),
    (
        "*.distcp",
        "is a distributed checkpoint of PyTorch or Megatron ({found}): merge it with "
        "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER OUT.pt`",
    ),
    ("*/*.distcp", "holds distributed checkpoints of PyTorch or Megatron ({found}), which are not supported"),
    ("latest_checkpointed_iteration.txt", "is a checkpoint of Megatron-LM, whose format is not GPT-NeoX's"),
    (
        "latest_universal",
        "is a universal checkpoint of DeepSpeed, not supported: use the one it was made from",
    ),
    ("model_index.json", "is a pipeline of diffusers, not a language model"),
    ("*.nemo", "holds a NeMo archive ({found}), which is not supported"),
    ("*.mlpackage", "holds a Core ML model ({found}), which is not supported"),
    ("*.tflite", "holds a TensorFlow Lite model ({found}), which is not supported"),
    ("*.engine", "holds a TensorRT engine ({found}), which is not supported"),
    ("consolidated*", "holds weights in the layout of Llama's or Mistral's authors ({found}), which is not supported"),
    ("_CHECKPOINT_METADATA", "is an Orbax checkpoint without the model's config.json{above}"),
    ("manifest.ocdbt", "is an Orbax checkpoint without the model's config.json{above}"),
    ("checkpoint-*", "is an output folder of transformers' Trainer: name one of its checkpoints, {found}"),
    ("model*.safetensors*", "holds {found} without a config.json, which has the model's sizes: add the model's own"),
    ("pytorch_model*", "holds {found} without a config.json, which has the model's sizes: add the model's own"),
    ("params.safetensors*", "holds {found} without the config.json that jaxmodels wrote beside it"),
    ("layer_*", "holds {found}, which are not named as GPT-NeoX's shards (layer_NN-model_NN-model_states.pt)"),
    ("*.safetensors", "holds {found}, which are not named as a model's weights (model.safetensors)"),
    ("*.ckpt", "holds a checkpoint of Lightning ({found}): convert its state_dict with `jaxmodels convert torch`"),
    ("*.pt", "holds {found}, which are not GPT-NeoX's shards: convert a state_dict with `jaxmodels convert torch`"),
    ("*.pth", "holds {found}, which are not GPT-NeoX's shards: convert a state_dict with `jaxmodels convert torch`"),
    ("*.zip", "holds an archive ({found}): unpack it"),
    ("*.tar*", "holds an archive ({found}): unpack it"),
    ("*.tgz", "holds an archive ({found}): unpack it"),
    (TOKENIZER, "holds a tokenizer and no weights"),
    ("tokenizer_config.json", "holds a tokenizer and no weights"),
    ("vocab.json", "holds a tokenizer and no weights"),
    ("20B_tokenizer.json", "holds a tokenizer and no weights"),
    (".git", "is a git repository without a checkpoint in its working tree: run `git checkout` and `git lfs pull`"),
)
QUANTIZED_NAMES = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".SCB": "bitsandbytes (8 bits)",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes (4 bits)",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes (4 bits)",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "float8",
}


def explain(folder: Path, children: Sequence[tuple[str, str]]) -> str:
    """Sentence on a folder that cannot be loaded; children: names and kinds of its subfolders that can."""
    if (folder / "refs").is_dir() and not (folder / "snapshots").is_dir():
        return f"{folder} is an unfinished download of the Hub's cache: run `hf download` again"
    found = sorted(itertools.islice(names_below(folder), MOST_FILES))
    return explain_names(str(folder), found, folder, children)


def names_below(folder: Path) -> Iterator[str]:
    """Paths of files below a folder, and of folders with a slash at their end, as far as they can be searched."""
    for place, folders, files in walk(folder, lambda deep: None):
        here = place.relative_to(folder)
        yield from ((here / name).as_posix() + "/" for name in folders)
        yield from ((here / name).as_posix() for name in files)


def explain_names(where: str, names: Sequence[str], folder: Path, children: Sequence[tuple[str, str]] = ()) -> str:
    """Sentence on files that hold no checkpoint to load.

    names: of the files, and of folders with a slash at their end. folder: where those of small size lie.
    """
    if not names:
        return f"{where} is an empty folder; expected {EXPECTED}"
    if (folder / "adapter_config.json").is_file():
        return f"{where} {adapter(folder / 'adapter_config.json')}"
    described = (folder / "config.json").is_file() and "config.json" in names
    if described and matching(names, HF_WEIGHTS) and "model_type" not in read_object(folder / "config.json"):
        return f"{where} has a config.json without model_type; expected {MODEL_TYPE!r}"
    for pattern, sentence in SIGNS:
        found = matching(names, (pattern, f"{pattern}/"))
        if found:
            return f"{where} {sentence.format(found=shortened(found), above=owner_of(folder))}"
    if children:
        subfolders = ", ".join(f"{name} ({kind})" for name, kind in children)
        return f"{where} holds no checkpoint itself; name one of its subfolders: {subfolders}"
    if described:
        if "model_type" in read_object(folder / "config.json"):
            return f"{where} has a config.json and no weights; expected model.safetensors or pytorch_model.bin"
        return f"{where} has a config.json that describes no model, without model_type and format; expected {EXPECTED}"
    first = sorted({name.partition("/")[0] for name in names})
    return f"{where} holds no checkpoint, but {shortened(first)}; expected {EXPECTED}"


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Names that match a pattern, part by part; the pattern's last part may be **, for anything below."""
    return [name for name in names if any(matches(name, pattern) for pattern in patterns)]


def matches(name: str, pattern: str) -> bool:
    """True if each part of a path matches the pattern's."""
    parts, wanted = name.split("/"), pattern.split("/")
    if wanted[-1] == "**" and len(parts) >= len(wanted):
        parts, wanted = parts[: len(wanted) - 1], wanted[:-1]
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def explain_file(path: Path) -> str:
    """Sentence on a path that is not a folder."""
    if path.is_symlink() and not path.exists():
        return f"{path} is a symbolic link to {path.readlink()}, which does not exist"
    if not path.exists():
        return f"{path} is not a folder, nor the id of a model on the Hub (ORG/NAME)"
    if not path.is_file():
        return f"{path} is neither a folder nor a regular file"
    pointer = pointer_text(path)
    if pointer is not None:
        return f"{path} {pointer}"
    what = kind_of_file(path)
    parent = path.absolute().parent
    if what.endswith(("not supported", "unpacked")):
        return f"{path} is {what}"
    if path.suffix in (".json", ".safetensors", ".bin") or path.name == "latest":
        return f"{path} is {what}; name the folder with all files of the checkpoint, {parent}"
    if path.suffix in (".pt", ".pth", ".ckpt"):
        return f"{path} is {what}; name a folder of shards, or convert a state_dict with `jaxmodels convert torch`"
    return f"{path} is {what}; expected a folder: {EXPECTED}"


def kind_of_file(path: Path) -> str:
    """Description of a file by its first bytes or its suffix."""
    with path.open("rb") as file:
        start = file.read(HEAD)
    if start.startswith(b"GGUF"):
        return "a GGUF file of llama.cpp, which is not supported"
    if start.startswith(b"\x89HDF"):
        return "an HDF5 file, as TensorFlow's weights, which is not supported"
    if path.suffix == ".onnx":
        return "an ONNX model, which is not supported"
    if path.suffix == ".msgpack":
        return "a file of transformers' Flax weights, which is not supported"
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        return "a file of PyTorch"
    # Not tarfile.is_tarfile, which decompresses as much as the first entry says.
    if is_zip(path) or start.startswith(COMPRESSED) or start[257:262] == b"ustar":
        return "an archive, which must be unpacked"
    return "a single file"


def adapter(file: Path) -> str:
    """Sentence on an adapter_config.json of PEFT, without its subject."""
    content = read_object(file)
    base, kind = content.get("base_model_name_or_path"), content.get("peft_type", "an adapter")
    return (
        f"holds adapter weights of PEFT ({quoted(kind)}) for the base model {quoted(base)}, not a model: merge them "
        "with peft's merge_and_unload() and save_pretrained(), and load the result"
    )


def owner_of(folder: Path) -> str:
    """Advice for an Orbax folder: the model's folder around it, if it is there."""
    parent = folder.absolute().parent
    return f": name the folder {parent}" if (parent / "config.json").is_file() else ""


def check_pointers(folder: Path, patterns: Iterable[str]) -> None:
    """Raises ValueError, naming the file, if one is a git-lfs pointer, an error page or a link to a missing file.

    Also for a FIFO, a device or a socket.
    """
    patterns = tuple(patterns)
    for path in sorted(folder.iterdir()):
        if not any(path.name == pattern or fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns):
            continue
        check_pointer(path)


def check_pointer(path: Path) -> None:
    """Raises ValueError, naming the file, as `check_pointers`."""
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a link to a file that is missing: run `hf download` again")
    refuse_special(path)
    text = pointer_text(path)
    if text is not None:
        raise ValueError(f"{path} {text}")


def pointer_text(path: Path) -> str | None:
    """Describe a file that stands for another one; None for any other file."""
    if not path.is_file() or path.stat().st_size > POINTER_BYTES * 50:
        return None
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    if not start.startswith(tuple(POINTERS)):
        return None
    return next(text for beginning, text in POINTERS.items() if start.startswith(beginning))


def check_step(folder: Path) -> Path:
    """Folder of the step that GPT-NeoX's reader would open, or `folder` if it finds none.

    Raises ValueError if it is a checkpoint of DeepSpeed without whole weights.
    """
    step = named_step(folder)
    check_pointers(step, ["*model_states.pt"])
    names = [path.name for path in step.iterdir()]
    zero3 = [name for name in names if name.startswith("zero_pp_rank_") and name.endswith("model_states.pt")]
    if zero3:
        raise ValueError(f"{folder} {ZERO3.replace('FOLDER', str(folder))}")
    weights = [name for name in names if name.endswith("model_states.pt")]
    if not weights and (step / "zero").is_dir():
        raise ValueError(f"{step} is a universal checkpoint of DeepSpeed, not supported: use the one it was made from")
    if not weights and any(name.endswith("optim_states.pt") for name in names):
        raise ValueError(
            f"{step} holds optimizer states of ZeRO alone; the weights (layer_*-model_*-model_states.pt or "
            "mp_rank_*_model_states.pt) are missing"
        )
    return step


def named_step(folder: Path) -> Path:
    """Folder that `latest` names, or the only global_step*, or `folder` itself."""
    latest = folder / "latest"
    if latest.is_file():
        name = read_bytes(latest, 4096).decode("utf-8", "replace").strip()
        named = folder / name if is_plain(name) else folder
        return named if named.is_dir() else folder
    steps = [step for step in folder.glob("global_step*") if step.is_dir()]
    return steps[0] if len(steps) == 1 and not any(folder.glob("*_states.pt")) else folder


def check_hf(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises ValueError if the config.json of a Hugging Face folder is of another model or of quantized weights.

    Also if the name of its weights is not a string.
    """
    if config["model_type"] != MODEL_TYPE:
        raise ValueError(
            f"{folder / 'config.json'} has model_type {quoted(config['model_type'])}; expected {MODEL_TYPE!r}, the "
            "only Hugging Face architecture that is supported"
        )
    weights = config.get("transformers_weights")
    if not isinstance(weights, str | None):
        raise ValueError(f"{folder / 'config.json'} has transformers_weights {quoted(weights)}; expected a file's name")
    quantization = config.get("quantization_config") or config.get("quantization")  # the second is MLX's
    if quantization:
        method = quantization.get("quant_method", quantization) if isinstance(quantization, dict) else quantization
        raise ValueError(
            f"{folder / 'config.json'} has a quantization_config of {quoted(method)}: quantized weights are not "
            "supported; load the model they were made from (int8: `jaxmodels quantize`)"
        )


def check_weights(folder: Path, variant: str | None) -> None:
    """Raises ValueError if the weights to read in a Hugging Face folder are pointers, float8 or packed.

    Files that are missing or damaged are left to the reader.
    """
    try:
        name = read_object(folder / "config.json").get("transformers_weights")
        if not isinstance(name, str):
            name, _ = chosen([path.name for path in folder.iterdir()], variant, str(folder))
        index = read_object(folder / name) if name.endswith(".json") else {}
    except ValueError:
        return
    weight_map = index.get("weight_map")
    files = {str(file) for file in weight_map.values()} if isinstance(weight_map, dict) else {name}
    for path in sorted(path for path in folder.iterdir() if path.name in files):  # an index may name a million files
        check_pointer(path)
        if path.suffix == ".safetensors" and path.is_file():
            check_header(path)


def check_header(file: Path) -> None:
    """Raises ValueError, naming the file, if a safetensors file holds float8 or packed weights; others are not read."""
    header = safetensors_header(file)
    dtypes = {str(entry.get("dtype")) for entry in header.values() if isinstance(entry, dict)}
    small = sorted(dtype for dtype in dtypes if SMALL_FLOAT.match(dtype))
    if small:
        bits = f"float{small[0][1]}"
        raise ValueError(f"{file} has {bits} weights ({', '.join(small)}), which are not supported; {FROM_FLOATS}")
    for name in header:
        method = next((method for end, method in QUANTIZED_NAMES.items() if name.endswith(end)), None)
        if method is not None:
            raise ValueError(f"{file} has weights quantized by {method} ({quoted(name)}), not supported; {FROM_FLOATS}")


SMALL_FLOAT = re.compile(r"F[468](?:_|$)")  # F8_E4M3, F6_E2M3, F4; not F64
FROM_FLOATS = "load the model they were made from, in float16, bfloat16 or float32"


def safetensors_header(file: Path) -> dict[str, Any]:
    """Header of a safetensors file; empty if it cannot be read, which the reader reports."""
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            if size > min(file.stat().st_size, CONFIG_BYTES):  # 100,000 tensors: no model with packed weights has more
                return {}
            header = parsed(opened.read(size).decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return header if isinstance(header, dict) else {}


def shortened(names: Iterable[str]) -> str:
    """The first names of a list."""
    first, *rest = names
    shown = [first, *rest[:2]]
    return ", ".join(shown) + (f" and {len(rest) - 2} more" if len(rest) > 2 else "")
