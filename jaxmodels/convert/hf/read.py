"""Reader of GPT-NeoX checkpoints in the format of `transformers`."""

import os
from pathlib import Path
from typing import Any

from jaxmodels.convert.companions import Companions
from jaxmodels.convert.hf.config import DEFAULT_IDS, read_config
from jaxmodels.convert.hf.names import twin_names
from jaxmodels.convert.neox.layout import hf_name
from jaxmodels.convert.source import Source, matched
from jaxmodels.io.safetensors import is_folder, read_folder
from jaxmodels.neox import NeoX
from jaxmodels.weights.place import Shardings


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
    config, notes = read_config(folder / "config.json")
    if not is_folder(folder, "model"):
        others = ", ".join(sorted(file.name for file in folder.glob("pytorch_model*"))[:3])
        raise ValueError(f"{folder} has neither model.safetensors nor its index{f', but {others}' if others else ''}")
    held = twin_names(read_folder(folder), config, str(folder))
    tensors = matched(folder, config, held, hf_name)
    companions = Companions.of(folder, defaults=DEFAULT_IDS)
    return Source("hf", folder, config, tensors, "safetensors for transformers", tuple(notes), companions=companions)
