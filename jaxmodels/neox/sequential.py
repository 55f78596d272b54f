"""State_dicts of the original implementation, a flat `nn.Sequential`, renamed to the names of the twins.

0.emb.weight                  embedding.emb.weight
1.pre_ln_attn.weight …        layers.0.pre_ln_attn.weight …
L+1.ln.weight                 final_norm.ln.weight
L+2.linear.weight             readout.linear.weight

The names on disk of GPT-NeoX's and Hugging Face's checkpoints are in `jaxmodels.convert.neox.layout`.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmodels.neox.config import NeoXConfig
from jaxmodels.rope import check_frequencies
from jaxmodels.weights.names import Renamed, as_numpy

# The rotary frequencies, the causal mask in transformers' older files, and the value of masked scores there.
BUFFERS = (".attention.rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")

LARGEST_MASKED = -1_000  # a larger value of masked scores would not hide later tokens; transformers has -1e9
MASK = 2**26  # values of a stored causal mask, of 8,192 tokens


def adapted(state_dict: Mapping[str, Any], config: NeoXConfig) -> Mapping[str, Any]:
    """Rename a state_dict to the twins' names, and leave out rotary frequencies and masks.

    Raises ValueError if a frequency or mask contradicts the configuration.
    """
    flat = bool(state_dict) and all(re.match(r"\d+\.", key) for key in state_dict)
    named = {twin_name(key, config.n_layers) if flat else key: key for key in state_dict}
    buffers = {new for new, old in named.items() if new.endswith(BUFFERS) and is_buffer(new, state_dict[old], config)}
    return Renamed(state_dict, {new: old for new, old in named.items() if new not in buffers})


def twin_name(key: str, n_layers: int) -> str:
    """Name in the twin of a key of the flat Sequential."""
    number, rest = key.split(".", 1)
    i = int(number)
    if 1 <= i <= n_layers:
        return f"layers.{i - 1}.{rest}"
    return {0: "embedding", n_layers + 1: "final_norm", n_layers + 2: "readout"}.get(i, number) + f".{rest}"


def is_buffer(key: str, tensor: Any, config: NeoXConfig) -> bool:
    """True for stored rotary frequencies and causal masks; raises ValueError if they contradict the configuration."""
    frequencies, mask_name, masked_bias = BUFFERS
    if key.endswith(frequencies):
        check_frequencies(key, as_numpy(tensor), config.d_rope, config.rope_base)
        return True
    if key.endswith(mask_name):
        mask = as_numpy(tensor)
        if not 0 < mask.size <= MASK:
            raise ValueError(f"{key} with shape {list(mask.shape)} must be a causal mask of 1 to {MASK:,} values")
        mask = mask.view(np.bool_) if mask.dtype == np.uint8 and mask.max(initial=0) <= 1 else mask.astype(bool)
        if mask.ndim < 2 or not (mask == triangle(*mask.shape[-2:])).all():
            raise ValueError(f"{key} with shape {list(mask.shape)} must be a causal mask")
        return True
    if key.endswith(masked_bias):
        value = as_numpy(tensor) if tensor.shape == () else None
        if value is None or not value <= LARGEST_MASKED:
            found = list(tensor.shape) if value is None else f"[] and the value {value}"
            raise ValueError(f"{key} with shape {found} must be a number of at most {LARGEST_MASKED:,}")
        return True
    return False


@functools.lru_cache(maxsize=1)  # the masks of all layers are equal
def triangle(rows: int, columns: int) -> np.ndarray:
    """Causal mask."""
    return np.tri(rows, columns, dtype=np.bool_)
