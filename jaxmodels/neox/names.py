"""State_dicts of the original, whose model is one flat `nn.Sequential`, and what they hold beside parameters.

0.emb.weight                  embedding.emb.weight
1.pre_ln_attn.weight …        layers.0.pre_ln_attn.weight …
L+1.ln.weight                 final_norm.ln.weight
L+2.linear.weight             readout.linear.weight
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmodels.neox.config import NeoXConfig
from jaxmodels.weights.names import as_numpy


def adapted(state_dict: Mapping[str, Any], config: NeoXConfig) -> dict[str, Any]:
    """The state_dict under the names of the twins, without rotary frequencies and masks.

    Raises ValueError where one of these says something else than the configuration.
    """
    flat = bool(state_dict) and all(re.match(r"\d+\.", key) for key in state_dict)
    named = {named_part(key, config.n_layers) if flat else key: tensor for key, tensor in state_dict.items()}
    return {key: tensor for key, tensor in named.items() if not is_no_parameter(key, tensor, config)}


def named_part(key: str, n_layers: int) -> str:
    """The twin's name for a key of the flat Sequential."""
    number, rest = key.split(".", 1)
    i = int(number)
    if 1 <= i <= n_layers:
        return f"layers.{i - 1}.{rest}"
    return {0: "embedding", n_layers + 1: "final_norm", n_layers + 2: "readout"}.get(i, number) + f".{rest}"


def is_no_parameter(key: str, tensor: Any, config: NeoXConfig) -> bool:
    """Whether the key is a known one that holds no parameter; raises ValueError where it contradicts the config."""
    if key.endswith(".attention.rotary_emb.inv_freq"):
        expected = config.rope_base ** (-np.arange(0, config.d_rope, 2) / config.d_rope)
        given = as_numpy(tensor).astype(np.float64)
        if given.shape != expected.shape or not np.allclose(given, expected, rtol=1e-2):  # they may be 16 bits wide
            raise ValueError(
                f"{key} are not the frequencies of rope_base={config.rope_base} over {config.d_rope} features "
                f"(rope_percentage={config.rope_percentage})"
            )
        return True
    if key.endswith(".attention.bias"):  # the causal mask of transformers' older files
        mask = as_numpy(tensor).astype(bool)
        if mask.ndim < 2 or not (mask == np.tri(*mask.shape[-2:]).astype(bool)).all():
            raise ValueError(f"{key} is no causal mask; it has shape {list(mask.shape)}")
        return True
    return key.endswith(".attention.masked_bias")
