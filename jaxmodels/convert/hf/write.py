"""Writer of GPT-NeoX checkpoints in the format of `transformers`."""

import collections
import importlib.util
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.convert.companions import TOKENIZER
from jaxmodels.convert.hf.config import END_OF_TEXT, check_expressible, hf_config
from jaxmodels.convert.neox.layout import hf_name
from jaxmodels.convert.source import Source, model_source
from jaxmodels.io.atomic import atomic_file, atomic_folder
from jaxmodels.io.bounded import TOKENIZER_BYTES, read_text
from jaxmodels.io.formats.safetensors import FILE_BYTES, write_folder
from jaxmodels.neox import NeoX
from jaxmodels.text import TokenizerFile
from jaxmodels.text.tokenizer.special import CONFIG
from jaxmodels.weights.lazy import nbytes
from jaxmodels.weights.progress import progress_bar


def save_hf(model: NeoX, folder: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Write a model for `transformers`, atomically; in files of up to 5 GB, with an index if there are several.

    Raises ValueError like `jaxmodels.save`, or if the model is quantized, or if transformers has no setting for its
    configuration: RMSNorm, fewer heads of keys and values, a feed-forward network without biases.
    """
    write_hf(model_source(model), folder, overwrite=overwrite)


def write_hf(
    source: Source, folder: str | os.PathLike, *, overwrite: bool = False, file_bytes: int = FILE_BYTES
) -> None:
    """Write an open checkpoint as `save_hf` does; a few megabytes at a time are in memory."""
    check_expressible(source.config)
    tensors = {hf_name(key): tensor for key, tensor in source.tensors.items()}
    with (
        atomic_folder(folder, overwrite=overwrite) as temporary,
        progress_bar(f"writing {Path(folder).name}", tensors.values()) as advance,
    ):
        write_folder(temporary, tensors, file_bytes=file_bytes, progress=advance)
        dtype = main_dtype(source.tensors.values())
        text = json.dumps(hf_config(source.config, dtype, source.companions.config_ids or END_OF_TEXT), indent=2)
        (temporary / "config.json").write_text(text + "\n", encoding="utf-8")
        source.companions.write(temporary)
        if source.format != "hf":  # a published folder keeps its own files
            keep_rules(temporary)


def keep_rules(folder: Path) -> None:
    """Have transformers read a folder's tokenizer.json as it is, where the model's class would give it other ids."""
    file, settings = folder / TOKENIZER, folder / CONFIG
    if not file.is_file() or settings.exists() or importlib.util.find_spec("tokenizers") is None:
        return
    try:
        same = TokenizerFile.read(file).content == read_text(file, TOKENIZER_BYTES)
    except ValueError:  # its rules are not those of the class
        same = False
    if not same:
        with atomic_file(settings) as new:
            new.write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n', encoding="utf-8")


def main_dtype(tensors: Iterable[Any]) -> str:
    """Name of the dtype of most bytes, in which transformers loads all tensors by default."""
    sizes: collections.Counter[str] = collections.Counter()
    for tensor in tensors:
        sizes[np.dtype(tensor.dtype).name] += nbytes(tensor)
    return sizes.most_common(1)[0][0]
