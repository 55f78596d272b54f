"""Checkpoint that a run fine-tunes: opened from a folder of any kind or a Hub id, with its dtype and its companions.

RUN/config.json    {…, "original": {"source": …, "dtype": "float16"}, "token_ids": {"eos_token_id": 0, …}}
RUN/               tokenizer files and generation_config.json, as published
"""

import collections
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmodels.convert.companions import TOKENIZER, Companions
from jaxmodels.convert.open import Opened, open_source
from jaxmodels.io.checkpoint import stored_types
from jaxmodels.io.content import STEM, holds_safetensors
from jaxmodels.process.paths import check_utf8
from jaxmodels.weights.names import Type


@dataclasses.dataclass(frozen=True)
class Original:
    """Origin of a run: the source as the user named it, the dtype in which it is exported again, and its companions."""

    source: str
    dtype: str
    companions: Companions

    def about(self) -> dict[str, Any]:
        """Entries of the run's config.json."""
        return {"original": {"source": self.source, "dtype": self.dtype}, **self.companions.in_config()}


def open_neox(source: str) -> Opened:
    """Open a checkpoint to fine-tune; raises ValueError, naming it, if it holds another model or a quantized one."""
    opened = open_source(source)
    if opened.model_name != "NeoX" or opened.is_quantized:
        kind = "a quantized NeoX" if opened.model_name == "NeoX" else f"a {opened.model_name}"
        raise ValueError(f"checkpoint={source!r} holds {kind}, must be a NeoX to train")
    return opened


def original_of(opened: Opened, tokenizer: str | None = None) -> Original:
    """Describe an open checkpoint. tokenizer: tokenizer.json that is used instead of the checkpoint's own.

    The dtype is that of most values; if the checkpoint is a run that fine-tuned another one, that one's.
    """
    companions = opened.companions
    if tokenizer is not None:
        companions = dataclasses.replace(companions, files={**companions.files, TOKENIZER: Path(tokenizer)})
    source = str(Path(opened.name).absolute()) if Path(opened.name).exists() else opened.name  # or a Hub id
    check_utf8(source, "checkpoint")
    return Original(source, opened.original.get("dtype") or most_common(types_of(opened)), companions)


def types_of(opened: Opened) -> list[Type]:
    """Shapes and dtypes of an open NeoX's arrays, without reading them."""
    if opened.kind in ("model", "run") and not holds_safetensors(opened.weights):
        return list(stored_types(opened.weights / STEM).values())
    return [Type(tuple(tensor.shape), np.dtype(tensor.dtype)) for tensor in opened.neox().tensors.values()]


def most_common(types: list[Type]) -> str:
    """Name of the dtype of most values."""
    sizes: collections.Counter[str] = collections.Counter()
    for shape, dtype in types:
        sizes[dtype.name] += math.prod(shape)
    return sizes.most_common(1)[0][0]


def widest(types: list[Type]) -> str:
    """Narrowest dtype up to float32 that holds values of all of these dtypes; float64 becomes float32."""
    dtype = jnp.result_type(*{dtype for _, dtype in types})
    return "float32" if dtype == np.float64 else dtype.name
