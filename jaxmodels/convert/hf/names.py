"""Names of the tensors in files of `transformers`; the table itself is in `jaxmodels.convert.neox.layout`."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmodels.convert.neox.layout import hf_name
from jaxmodels.convert.source import named
from jaxmodels.neox import NeoXConfig
from jaxmodels.neox.sequential import is_buffer

READOUT = "embed_out.weight"
READOUT_ALIAS = "lm_head.weight"  # its name in memory since transformers 5.14
BUFFER = re.compile(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$")


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
