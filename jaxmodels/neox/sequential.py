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
PLAIN = re.compile(r"0|[1-9][0-9]{0,8}")  # a number in a name
NUMBERED = re.compile(r"[0-9]+\.")
BUFFER = re.compile(rf"layers\.({PLAIN.pattern})({'|'.join(map(re.escape, BUFFERS))})")

LARGEST_MASKED = -1_000  # a larger value of masked scores would not hide later tokens; transformers has -1e9
MASK = 2**26  # values of a stored causal mask, of 8,192 tokens


def adapted(state_dict: Mapping[str, Any], config: NeoXConfig) -> Mapping[str, Any]:
    """Rename a state_dict to the twins' names, and leave out rotary frequencies and masks.

    Raises ValueError if a frequency or mask contradicts the configuration.
    """
    flat = bool(state_dict) and all(NUMBERED.match(key) for key in state_dict)
    named = {twin_name(key, config.n_layers) if flat else key: key for key in state_dict}
    buffers = {new for new in named if is_buffer(new, config.n_layers)}
    for new in buffers:
        check_buffer(new, state_dict[named[new]], config)
    return Renamed(state_dict, {new: old for new, old in named.items() if new not in buffers})


def twin_name(key: str, n_layers: int) -> str:
    """Name in the twin of a key of the flat Sequential; the key itself if it is no part of the model."""
    number, rest = key.split(".", 1)
    last = {str(n_layers + 1): "final_norm", str(n_layers + 2): "readout", "0": "embedding"}
    if number in last:
        return f"{last[number]}.{rest}"
    # Of several spellings of a number, as 1 and 01, one is a name: two tensors would have the same.
    layer = int(number) if PLAIN.fullmatch(number) else 0
    return f"layers.{layer - 1}.{rest}" if 1 <= layer <= n_layers else key


def is_buffer(key: str, n_layers: int) -> bool:
    """True for the twin's name of rotary frequencies or of a causal mask in a layer that the model has."""
    found = BUFFER.fullmatch(key)
    return found is not None and int(found[1]) < n_layers


def check_buffer(key: str, tensor: Any, config: NeoXConfig) -> None:
    """Raises ValueError, naming the key, if rotary frequencies or a causal mask contradict the configuration."""
    _, mask_name, _ = BUFFERS
    if key.endswith("inv_freq"):
        check_frequencies(key, as_numpy(tensor), config.d_rope, config.rope_base)
    elif key.endswith(mask_name):
        mask = as_numpy(tensor)
        if not 0 < mask.size <= MASK:
            raise ValueError(f"{key} with shape {list(mask.shape)} must be a causal mask of 1 to {MASK:,} values")
        mask = mask.view(np.bool_) if mask.dtype == np.uint8 and mask.max(initial=0) <= 1 else mask.astype(bool)
        if mask.ndim < 2 or not (mask == triangle(*mask.shape[-2:])).all():
            raise ValueError(f"{key} with shape {list(mask.shape)} must be a causal mask")
    else:
        value = as_numpy(tensor) if tensor.shape == () else None
        if value is None or not value <= LARGEST_MASKED:
            found = list(tensor.shape) if value is None else f"[] and the value {value}"
            raise ValueError(f"{key} with shape {found} must be a number of at most {LARGEST_MASKED:,}")


@functools.lru_cache(maxsize=1)  # the masks of all layers are equal
def triangle(rows: int, columns: int) -> np.ndarray:
    """Causal mask."""
    return np.tri(rows, columns, dtype=np.bool_)
