"""GPT-NeoX checkpoints in the format of `transformers` (GPTNeoXForCausalLM): config.json and safetensors.

Names of tensors are in `jaxmodels.convert.neox.layout`.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.convert.neox.layout import hf_name
from jaxmodels.convert.source import Source, matched, model_source, named
from jaxmodels.io.atomic import atomic_folder
from jaxmodels.io.checkpoint import read_json
from jaxmodels.io.safetensors import FILE_BYTES, is_folder, read_folder, write_folder
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.neox.sequential import is_buffer
from jaxmodels.weights.place import Shardings
from jaxmodels.weights.progress import progress_bar

READOUT = "embed_out.weight"
READOUT_ALIAS = "lm_head.weight"  # its name in memory since transformers 5.14
BUFFER = re.compile(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$")

# Field of NeoXConfig, key, and transformers' default of an absent key; None: the key is required.
KEYS: tuple[tuple[str, str, Any], ...] = (
    ("n_vocab", "vocab_size", None),
    ("n_hidden", "hidden_size", None),
    ("n_layers", "num_hidden_layers", None),
    ("n_heads", "num_attention_heads", None),
    ("n_ff", "intermediate_size", 24_576),
    ("parallel_residual", "use_parallel_residual", True),
    ("layer_norm_eps", "layer_norm_eps", 1e-5),
    ("tied", "tie_word_embeddings", False),
    ("max_len", "max_position_embeddings", 2_048),
)
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
END_OF_TEXT = {"bos_token_id": 0, "eos_token_id": 0}  # <|endoftext|>; transformers' own default is another token


def load_hf(
    folder: str | os.PathLike, dtype: Any = None, shardings: Shardings | None = None, layers: Any = None
) -> NeoX:
    """Load a model from a folder with config.json and safetensors files; arguments as `load_neox`.

    Raises ValueError, naming the file, if one is missing or damaged, if the configuration is not GPT-NeoX's or is not
    supported, or if the tensors do not fit it.
    """
    return open_hf(folder).with_layers(layers).model(dtype, shardings)


def open_hf(folder: str | os.PathLike) -> Source:
    """Open a checkpoint without reading its values; raises ValueError like `load_hf`."""
    folder = Path(folder)
    content = read_hf_json(folder / "config.json")
    config, notes = read_config(folder / "config.json")
    if not is_folder(folder, "model"):
        others = ", ".join(sorted(file.name for file in folder.glob("pytorch_model*"))[:3])
        raise ValueError(f"{folder} has neither model.safetensors nor its index{f', but {others}' if others else ''}")
    held = twin_names(read_folder(folder), config, str(folder))
    tensors = matched(folder, config, held, hf_name)
    token_ids = {key: content[key] for key in TOKEN_IDS if key in content}
    return Source("hf", folder, config, tensors, "safetensors for transformers", tuple(notes), token_ids=token_ids)


def twin_names(stored: Mapping[str, Any], config: NeoXConfig, where: str) -> dict[str, Any]:
    """Tensors by the names of the PyTorch twin, without buffers, and without a tied readout; other names are kept.

    where: file or folder, for errors. Raises ValueError if a buffer contradicts the configuration.
    """
    held = dict(stored)
    if READOUT_ALIAS in held and READOUT not in held:
        held[READOUT] = held.pop(READOUT_ALIAS)
    table = held.get(hf_name("embedding.emb.weight"))
    if config.tied and table is not None and READOUT in held and np.array_equal(held[READOUT], table):
        held.pop(READOUT)
    for name in [name for name in held if BUFFER.fullmatch(name)]:
        try:
            is_buffer(name, held.pop(name), config)  # raises if it contradicts the configuration
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    twins = {hf_name(key): key for key in named(config)}
    return {twins.get(name, name): tensor for name, tensor in held.items()}


def read_hf_json(file: Path) -> dict[str, Any]:
    """Content of a config.json; raises ValueError, naming it, if it is not GPT-NeoX's."""
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {content!r}; expected a JSON object")
    if content.get("model_type") != "gpt_neox":
        raise ValueError(f"{file} has model_type {content.get('model_type')!r}; expected 'gpt_neox'")
    return content


def read_config(file: Path) -> tuple[NeoXConfig, list[str]]:
    """Configuration in a config.json, and a note on its activation.

    Raises ValueError, naming the file, if it is not GPT-NeoX's or has a setting that is not supported.
    """
    content = read_hf_json(file)
    found: dict[str, Any] = {field: content.get(key, absent) for field, key, absent in KEYS}
    missing = [key for field, key, absent in KEYS if absent is None and found[field] is None]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    rope = content.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{file} has rope_parameters {rope!r}, which is not a JSON object")
    scaling = content.get("rope_scaling") or rope
    if not isinstance(scaling, dict) or scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise ValueError(f"{file} has scaled rotary embeddings ({scaling}); supported is rope_type 'default'")
    found["rope_percentage"] = rope.get("partial_rotary_factor", content.get("rotary_pct", 0.25))
    found["rope_base"] = rope.get("rope_theta", content.get("rotary_emb_base", 10_000.0))
    activation = content.get("hidden_act", "gelu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"{file} has hidden_act {activation!r}; supported are {', '.join(ACTIVATIONS)}")
    if content.get("attention_bias", True) is not True:
        raise ValueError(f"{file} has attention_bias {content['attention_bias']!r}; supported is true")
    try:
        config = NeoXConfig(**found, activation=ACTIVATIONS[activation])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None
    return config, [f"hidden_act {activation!r} in config.json means {config.activation} here"]


def save_hf(model: NeoX, folder: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Write a model for `transformers`, atomically; in files of up to 5 GB, with an index if there are several.

    Raises ValueError like `jaxmodels.save`, or if the model is quantized.
    """
    write_hf(model_source(model), folder, overwrite=overwrite)


def write_hf(
    source: Source, folder: str | os.PathLike, *, overwrite: bool = False, file_bytes: int = FILE_BYTES
) -> None:
    """Write an open checkpoint as `save_hf` does; a few megabytes at a time are in memory."""
    tensors = {hf_name(key): tensor for key, tensor in source.tensors.items()}
    with (
        atomic_folder(folder, overwrite=overwrite) as temporary,
        progress_bar(f"writing {Path(folder).name}", tensors.values()) as advance,
    ):
        write_folder(temporary, tensors, file_bytes=file_bytes, progress=advance)
        dtype = np.dtype(source.tensors["embedding.emb.weight"].dtype).name
        text = json.dumps(hf_config(source.config, dtype, source.token_ids or END_OF_TEXT), indent=2)
        (temporary / "config.json").write_text(text + "\n", encoding="utf-8")


def hf_config(config: NeoXConfig, dtype: str, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `read_config`; rotary settings are written under the keys of older and newer transformers."""
    settings = {key: value for (field, key, _) in KEYS for value in [dataclasses.asdict(config)[field]]}
    return settings | {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "intermediate_size": config.d_ff,
        "hidden_act": {"gelu": "gelu", "gelu_tanh": "gelu_fast"}[config.activation],
        "rotary_pct": config.rope_percentage,
        "rotary_emb_base": config.rope_base,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_base,
            "partial_rotary_factor": config.rope_percentage,
        },
        "attention_bias": True,
        "torch_dtype": dtype,
        **token_ids,
    }
