"""config.json of GPT-NeoX in the format of `transformers`: conversion to and from `NeoXConfig`."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmodels.io.bounded import read_json
from jaxmodels.neox import NeoXConfig
from jaxmodels.process.texts import quoted, shortened

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
    ("attention_bias", "attention_bias", True),
    ("max_len", "max_position_embeddings", 2_048),
)
# Names of transformers for the two forms of GELU.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Key in `rope_parameters` or `rope_scaling`, the older key, field of NeoXConfig, default.
ROTARY: tuple[tuple[str, str, str, float], ...] = (
    ("partial_rotary_factor", "rotary_pct", "rope_percentage", 0.25),
    ("rope_theta", "rotary_emb_base", "rope_base", 10_000.0),
)
# Keys that are no settings of GPTNeoXConfig, but with which transformers computes other numbers, and the values with
# which it does not. It sets an attribute for each key: `attribute_map` and `__dict__` redirect or replace others.
# `configuration_files` names another file in place of this one; windows shorten the cache of keys and values.
HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "attribute_map": ({},),
    "__dict__": (),
    "configuration_files": ([],),
    "per_layer_config": (None, {}),
    "quantization_config": (None, {}),
    "is_causal": (None, True),
    "is_encoder_decoder": (None, False),
    "sliding_window": (None,),
    "attention_chunk_size": (None,),
}
FULL = ("full_attention", "attention")  # names of a layer that attends to all tokens before
DEFAULT_IDS = {"bos_token_id": 0, "eos_token_id": 2}  # transformers' defaults of absent keys
END_OF_TEXT = {"bos_token_id": 0, "eos_token_id": 0}  # <|endoftext|>, for checkpoints that store no token ids


def read_hf_json(file: Path) -> dict[str, Any]:
    """Content of a config.json; raises ValueError, naming it, if it is not GPT-NeoX's."""
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {quoted(content)}; expected a JSON object")
    if content.get("model_type") != "gpt_neox":
        raise ValueError(f"{file} has model_type {quoted(content.get('model_type'))}; expected 'gpt_neox'")
    return content


def read_config(file: Path) -> tuple[NeoXConfig, list[str]]:
    """Configuration in a config.json, as transformers reads it, and notes on its activation and on unusual values.

    Numbers may be strings; null means an absent key. Raises ValueError, naming the file and the key, if it is not
    GPT-NeoX's or has a setting that is not supported.
    """
    content = read_hf_json(file)
    notes: list[str] = []
    kinds = {field.name: field.type for field in dataclasses.fields(NeoXConfig)}
    found: dict[str, Any] = {}
    missing = []
    for field, key, absent in KEYS:
        value = content.get(key, absent)
        if value is not None:
            found[field] = checked(file, key, value, kinds[field], notes)
        elif absent is None:
            missing.append(key)
        elif key == "intermediate_size":
            notes.append(f"{key} null in config.json means 4 · hidden_size")
        else:
            found[field] = absent
            notes.append(f"{key} null in config.json means {absent}, the default")
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    found |= rotary(file, content, notes)
    activation = content.get("hidden_act", "gelu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"{file} has hidden_act {quoted(activation)}; supported are {', '.join(ACTIVATIONS)}")
    heads = content.get("num_key_value_heads")
    if heads is not None and checked(file, "num_key_value_heads", heads, int, notes) != found["n_heads"]:
        raise ValueError(
            f"{file} has num_key_value_heads {quoted(heads)}; supported is that of num_attention_heads, "
            f"{quoted(found['n_heads'])}"
        )
    try:
        config = NeoXConfig(**found, activation=ACTIVATIONS[activation])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {shortened(str(error), 400)}") from None
    check_same(file, content, config, notes)
    if config.activation != activation:
        notes.insert(0, f"hidden_act {quoted(activation)} in config.json means {config.activation} here")
    return config, notes


def check_same(file: Path, content: Mapping[str, Any], config: NeoXConfig, notes: list[str]) -> None:
    """Raise ValueError, naming file and key, for keys with which transformers would compute other numbers.

    They are none of GPTNeoXConfig: its model has the rotary frequencies of a `head_dim`; see HARMLESS for others.
    """
    for key, values in HARMLESS.items():
        if key in content and content[key] not in values:
            allowed = [json.dumps(value) for value in values if value is not None] or ["null"]
            supported = f"{allowed[-1]} or no such key" if values else "no such key"
            raise ValueError(
                f"{file} has {key} {quoted(content[key])}, with which transformers computes other numbers; "
                f"supported is {supported}"
            )
    kinds = content.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(kind in FULL for kind in kinds)):
        raise ValueError(f"{file} has layer_types {quoted(kinds)}; supported is {FULL[0]!r} for each layer")
    width = content.get("head_dim")
    if width is not None and checked(file, "head_dim", width, int, notes) != config.d_k:
        raise ValueError(
            f"{file} has head_dim {quoted(width)}; supported is hidden_size / num_attention_heads, {config.d_k}"
        )


def rotary(file: Path, content: Mapping[str, Any], notes: list[str]) -> dict[str, float]:
    """Fields of the rotary embedding; appends notes on keys that transformers does not read."""
    for key in ("rope_scaling", "rope_parameters"):
        if content.get(key) is not None and not isinstance(content[key], dict):
            raise ValueError(f"{file} has {key} {quoted(content[key])}, which is not a JSON object")
    where = "rope_scaling" if content.get("rope_scaling") else "rope_parameters"
    rope = {key: value for key, value in (content.get(where) or {}).items() if value is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(
            f"{file} has scaled rotary embeddings ({where} {quoted(rope)}); supported is rope_type 'default'"
        )
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(f"{file} has {where} for each of {quoted(nested)}; supported is one for all layers")
    fields = {}
    for key, older, field, default in ROTARY:
        used, value = next(
            ((name, held[name]) for name, held in ((key, rope), (older, content)) if held.get(name) is not None),
            (key, default),
        )
        fields[field] = checked(file, used, value, float, notes)
        other = "rope_parameters" if where == "rope_scaling" else "rope_scaling"
        unread = {
            key: content.get(key),
            older: content.get(older),
            f"{other}.{key}": (content.get(other) or {}).get(key),
        }
        for name, ignored in unread.items():
            if ignored is not None and ignored != value:
                notes.append(f"{name} {quoted(ignored)} in config.json is not read, as by transformers; it is {value}")
    return fields


def checked(file: Path, key: str, value: Any, kind: Any, notes: list[str]) -> Any:
    """Value of a key as the type of its field; appends a note if it was a string.

    Raises ValueError, naming file and key, if it is of another type.
    """
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{file} has {key} {quoted(value)}; expected true or false")
        return value
    if kind in (str, str | None):
        if not isinstance(value, str):
            raise ValueError(f"{file} has {key} {quoted(value)}; expected a string")
        return value
    try:
        number = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    whole = kind is not float
    if number is None or not math.isfinite(number) or (whole and not number.is_integer()):
        raise ValueError(f"{file} has {key} {quoted(value)}; expected {'an integer' if whole else 'a number'}")
    if isinstance(value, str):
        notes.append(f"{key} in config.json is the string {quoted(value)}, read as a number")
    if whole:
        return value if isinstance(value, int) else int(number)  # a float has 53 bits
    return number


# What transformers' GPTNeoXConfig has no setting for: field of NeoXConfig, and the value that its model has.
FIXED: tuple[tuple[str, Any], ...] = (("norm", "layernorm"), ("n_kv_heads", None), ("ffn_bias", True))


def check_expressible(config: NeoXConfig) -> None:
    """Raises ValueError if transformers' GPTNeoXForCausalLM cannot have this configuration."""
    for field, value in FIXED:
        if getattr(config, field) != value:
            raise ValueError(
                f"{field}={getattr(config, field)!r} cannot be written for transformers, whose GPT-NeoX has {field}="
                f"{value!r}; write GPT-NeoX's shards or a folder for jaxmodels.load instead"
            )


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
        "dtype": dtype,
        "torch_dtype": dtype,  # the key's name before transformers 4.56
        **token_ids,
    }
