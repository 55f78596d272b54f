"""config.json of GPT-NeoX in the format of `transformers`: conversion to and from `NeoXConfig`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmodels.io.checkpoint import read_json
from jaxmodels.neox import NeoXConfig

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
DEFAULT_IDS = {"bos_token_id": 0, "eos_token_id": 2}  # transformers' defaults of absent keys
END_OF_TEXT = {"bos_token_id": 0, "eos_token_id": 0}  # <|endoftext|>, for checkpoints that store no token ids


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
