"""Flax checkpoints of GPT-NeoX: opened as a `Source`, and written as a stream. `jaxmodels.models` has the formats."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np

from jaxmodels.convert.companions import Companions
from jaxmodels.convert.source import Source, abstract, check_stored, matched, model_source
from jaxmodels.io.atomic import atomic_folder
from jaxmodels.io.checkpoint import FORMAT, read_config, stored_arrays
from jaxmodels.io.content import STEM, holds_safetensors
from jaxmodels.io.formats.safetensors import FILE_BYTES, read_folder, write_folder
from jaxmodels.models import load
from jaxmodels.neox import NeoXConfig
from jaxmodels.process.texts import shortened
from jaxmodels.weights.lazy import Transposed
from jaxmodels.weights.names import entries, flat_arrays
from jaxmodels.weights.place import flax_name, from_flax_names
from jaxmodels.weights.progress import progress_bar


def open_flax(folder: str | os.PathLike) -> Source:
    """Open the checkpoint of a NeoX; safetensors are read when they are used, Orbax arrays at once.

    Raises ValueError, naming the file, if it is damaged, holds another model, or contradicts its config.json.
    """
    folder = Path(folder)
    name, fields = read_config(folder)
    if name not in ("NeoX", "LoRANeoX"):
        raise ValueError(f"{folder} holds a {name}, not a NeoX")
    if not holds_safetensors(folder):
        # An adapter is merged in float32 at least, so that the sum is rounded once, to the dtype that is written.
        wide = any(array.dtype == np.float64 for array in stored_arrays(folder).values())
        dtype = ("float64" if wide else "float32") if name == "LoRANeoX" else None
        source = model_source(load(folder, dtype=dtype))
        return dataclasses.replace(
            source, format="flax", folder=folder, layout="Orbax", companions=Companions.of(folder)
        )
    try:
        config = NeoXConfig(**{key: value for key, value in fields.items() if key != "stacked"})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {shortened(str(error))}") from None
    stored = read_folder(folder, STEM)
    check_stored(config, stored, folder / "config.json")
    held = from_flax_names(abstract(config), stored)
    tensors = matched(folder, config, held)
    return Source("flax", folder, config, tensors, "safetensors", companions=Companions.of(folder))


def write_flax(
    source: Source, folder: str | os.PathLike, *, overwrite: bool = False, file_bytes: int = FILE_BYTES
) -> None:
    """Write an open checkpoint for `jaxmodels.load`, atomically; a few megabytes at a time are in memory.

    Raises ValueError like `jaxmodels.save`.
    """
    model = abstract(source.config)
    order = {entry.key: entry for entry in entries(flat_arrays(model))}
    arrays = {}
    for key, tensor in source.tensors.items():
        arrays[flax_name(order[key])] = Transposed(tensor) if order[key].transposed else tensor
    with (
        atomic_folder(folder, overwrite=overwrite) as temporary,
        progress_bar(f"writing {Path(folder).name}", arrays.values()) as advance,
    ):
        write_folder(temporary, arrays, STEM, file_bytes=file_bytes, progress=advance)
        config = {"format": FORMAT, "model": "NeoX", "config": model.config(), **source.companions.in_config()}
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        source.companions.write(temporary)
