"""GPT-NeoX as `transformers` has it (GPTNeoXForCausalLM): config.json and safetensors."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.convert.source import Source, matched, model_source, named
from jaxmodels.io.atomic import atomic_folder
from jaxmodels.io.safetensors import FILE_BYTES, is_folder, read_folder, write_folder
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.neox.names import is_no_parameter
from jaxmodels.weights.place import Shardings
from jaxmodels.weights.progress import progress_bar

# The twin's name, and theirs; in blocks behind `layers.N.` and `gpt_neox.layers.N.`
OUTSIDE = {
    "embedding.emb.weight": "gpt_neox.embed_in.weight",
    "final_norm.ln.weight": "gpt_neox.final_layer_norm.weight",
    "final_norm.ln.bias": "gpt_neox.final_layer_norm.bias",
    "readout.linear.weight": "embed_out.weight",
}
INSIDE = {
    "pre_ln_attn": "input_layernorm",
    "pre_ln_ffn": "post_attention_layernorm",
    "attention.qkv_lin": "attention.query_key_value",
    "attention.output": "attention.dense",
    "ffn.dense_h_h4": "mlp.dense_h_to_4h",
    "ffn.dense_h4_h": "mlp.dense_4h_to_h",
}
READOUT = "embed_out.weight"
READOUT_TOO = "lm_head.weight"  # its name in memory since transformers 5.14
NO_PARAMETER = re.compile(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$")

# Field of NeoXConfig, key, and what an absent key means to transformers; None: it must be there.
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
    """The model of a folder with config.json and safetensors files; arguments as `load_neox` has them.

    Raises ValueError, naming the file, for one that is missing or damaged, a configuration that is no GPT-NeoX's or
    that the model here does not have, and for tensors that are not those of the configuration.
    """
    return open_hf(folder).with_layers(layers).model(dtype, shardings)


def open_hf(folder: str | os.PathLike) -> Source:
    """The checkpoint, checked but not read; errors as `load_hf` has them."""
    folder = Path(folder)
    said = read_json(folder / "config.json")
    config, notes = read_config(folder / "config.json")
    if not is_folder(folder, "model"):
        others = ", ".join(sorted(file.name for file in folder.glob("pytorch_model*"))[:3])
        raise ValueError(f"{folder} has no model.safetensors and no index of one{f', but {others}' if others else ''}")
    stored = read_folder(folder)
    if READOUT_TOO in stored and READOUT not in stored:
        stored[READOUT] = stored.pop(READOUT_TOO)
    table = stored.get(hf_name("embedding.emb.weight"))
    if config.tied and table is not None and READOUT in stored and np.array_equal(stored[READOUT], table):
        stored.pop(READOUT)
    for name in [name for name in stored if NO_PARAMETER.fullmatch(name)]:
        try:
            is_no_parameter(name, stored.pop(name), config)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
    twins = {hf_name(key): key for key in named(config)}
    held = {twins.get(name, name): tensor for name, tensor in stored.items()}
    tensors = matched(folder, config, held, hf_name)
    token_ids = {key: said[key] for key in TOKEN_IDS if key in said}
    return Source("hf", folder, config, tensors, "safetensors for transformers", tuple(notes), token_ids=token_ids)


def hf_name(key: str) -> str:
    if key in OUTSIDE:
        return OUTSIDE[key]
    _, layer, rest = key.split(".", 2)
    module, last = rest.rsplit(".", 1)
    return f"gpt_neox.layers.{layer}.{INSIDE[module]}.{last}"


def read_json(file: Path) -> dict[str, Any]:
    """What a config.json says; raises ValueError, naming it, for any but a GPT-NeoX's."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if not isinstance(said, dict) or said.get("model_type") != "gpt_neox":
        kind = said.get("model_type") if isinstance(said, dict) else said
        raise ValueError(f"{file} is for {kind!r}, not for model_type 'gpt_neox'")
    return said


def read_config(file: Path) -> tuple[NeoXConfig, list[str]]:
    """A config.json, and a note on its activation. Raises ValueError, naming it, for any but a GPT-NeoX's."""
    said = read_json(file)
    found: dict[str, Any] = {field: said.get(key, absent) for field, key, absent in KEYS}
    missing = [key for field, key, absent in KEYS if absent is None and found[field] is None]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    rope = said.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{file} has rope_parameters {rope!r}, which is no JSON object")
    scaling = said.get("rope_scaling") or rope
    if not isinstance(scaling, dict) or scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise ValueError(f"{file} has scaled rotary embeddings ({scaling}); supported is rope_type 'default'")
    found["rope_percentage"] = rope.get("partial_rotary_factor", said.get("rotary_pct", 0.25))
    found["rope_base"] = rope.get("rope_theta", said.get("rotary_emb_base", 10_000.0))
    activation = said.get("hidden_act", "gelu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"{file} has hidden_act {activation!r}; supported are {', '.join(ACTIVATIONS)}")
    if said.get("attention_bias", True) is not True:
        raise ValueError(f"{file} has attention_bias {said['attention_bias']!r}; supported is true")
    try:
        config = NeoXConfig(**found, activation=ACTIVATIONS[activation])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None
    return config, [f"hidden_act {activation!r} in config.json means {config.activation} here"]


def save_hf(model: NeoX, folder: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Writes a model so that `transformers` loads it, all of it or nothing; in files of up to 5 GB, with an index.

    Raises ValueError for a folder that is not empty unless `overwrite` is set.
    """
    write_hf(model_source(model), folder, overwrite=overwrite)


def write_hf(
    source: Source, folder: str | os.PathLike, *, overwrite: bool = False, file_bytes: int = FILE_BYTES
) -> None:
    """The same for any open checkpoint; a few megabytes at a time are in memory."""
    tensors = {hf_name(key): tensor for key, tensor in source.tensors.items()}
    with (
        atomic_folder(folder, overwrite=overwrite) as beside,
        progress_bar(f"writing {Path(folder).name}", tensors.values()) as advance,
    ):
        write_folder(beside, tensors, file_bytes=file_bytes, progress=advance)
        dtype = np.dtype(source.tensors["embedding.emb.weight"].dtype).name
        text = json.dumps(hf_config(source.config, dtype, source.token_ids or END_OF_TEXT), indent=2)
        (beside / "config.json").write_text(text + "\n", encoding="utf-8")


def hf_config(config: NeoXConfig, dtype: str, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `read_config`, for older and newer transformers."""
    said = {key: value for (field, key, _) in KEYS for value in [dataclasses.asdict(config)[field]]}
    return said | {
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
