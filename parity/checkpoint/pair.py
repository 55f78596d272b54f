"""The modules of a comparison of which one or both are checkpoints."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from jaxmodels.convert.compare import different_settings
from jaxmodels.convert.neox.shards import config_files, find_step
from jaxmodels.models import name_of
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.weights.names import as_numpy
from parity.checkpoint.opened import Checkpoint, Source, is_source, is_stored, opened
from parity.checkpoint.reference import NEOX_FIELDS, cast_like, check_dtypes, reference
from parity.compare.arguments import described, is_torch
from parity.compare.sides.torch_copy import copied
from parity.compare.weights.twins import Kept


class Opened(NamedTuple):
    """PyTorch's and Flax's module; kept: the weights that Flax keeps, if it is a checkpoint itself."""

    torch: Any
    flax: Any
    kept: Kept | None
    notes: tuple[str, ...]


def opened_pair(torch_module: Any, flax_module: Any) -> Opened:
    """Replace checkpoints by modules; raises ValueError if one does not fit the other side.

    PyTorch's checkpoint becomes its twin with these tensors. Flax's checkpoint becomes the model with shapes only and
    its weights as `kept`; PyTorch's are cast to their dtypes.
    """
    if is_stored(flax_module):
        if is_source(torch_module):
            return two(*both_opened(torch_module, flax_module))
        return stored_flax(torch_module, opened(flax_module))
    source = opened(torch_module, default=flax_module.settings if isinstance(flax_module, NeoX) else None)
    if flax_module is None:
        if not source.model:
            raise ValueError(f"torch_module={source.where} has no configuration; pass a folder, or a torch.nn.Module")
        model, config = source.model, source.config
    else:
        model, config = registered(flax_module), flax_module.config()
    source = source.of_model(model, config)
    module, note = reference(source)
    notes = [*source.notes, note]
    if flax_module is not None and (different := different_settings(source.config, flax_module.config())):
        notes.append(f"configurations of PyTorch and Flax differ: {'; '.join(different)}")
    return Opened(module, flax_module, None, tuple(notes))


def registered(flax_module: Any) -> str:
    """Name of a Flax module's class; raises ValueError if it has no twin into which tensors could be loaded."""
    try:
        return name_of(flax_module)
    except ValueError:
        raise ValueError(
            f"torch_module must be a torch.nn.Module for flax_module={described(flax_module)}: "
            "only the project's own models can be compared with a checkpoint alone"
        ) from None


def both_opened(
    first: Source, second: Source, config: NeoXConfig | None = None, row_bias: str | None = None
) -> tuple[Checkpoint, Checkpoint]:
    """Open two checkpoints of one model; one without a configuration gets the other's.

    config, row_bias: of GPT-NeoX's shards as `first`. Raises ValueError if neither has a configuration, and if tensors
    do not fit theirs.
    """
    # Shards may need the other's configuration. If neither has one, the presets decide.
    b = opened(second) if has_config(second) or not has_config(first) else None
    a = opened(first, config, row_bias, neox_config(b))
    b = opened(second, default=neox_config(a)) if b is None else b
    known = a if a.model else b
    if not known.model:
        raise ValueError(f"{a.where} and {b.where} have no configuration; one of them must be a folder")
    return a.of_model(known.model, known.config), b.of_model(known.model, known.config)


def has_config(source: Source) -> bool:
    """True for a folder that stores a configuration."""
    if isinstance(source, Checkpoint):
        return bool(source.model)
    if not isinstance(source, str | os.PathLike) or not Path(source).is_dir():
        return False
    folder = Path(source)
    stored = (folder / "config.json").is_file() or (folder / "checkpoints").is_dir()
    return stored or bool(config_files(folder, find_step(folder)))


def neox_config(checkpoint: Checkpoint | None) -> NeoXConfig | None:
    """Configuration of a checkpoint of NeoX."""
    if checkpoint is None or checkpoint.model != "NeoX":
        return None
    return NeoXConfig(**{name: value for name, value in checkpoint.config.items() if name in NEOX_FIELDS})


def two(first: Checkpoint, second: Checkpoint) -> Opened:
    """The modules of two checkpoints of one model."""
    module, note = reference(first)
    found = stored_flax(module, second)
    return found._replace(notes=(*first.notes, note, *found.notes))


def stored_flax(torch_module: Any, stored: Checkpoint) -> Opened:
    """PyTorch's module and a Flax checkpoint; raises ValueError if it has no configuration or does not fit."""
    if not stored.model:
        raise ValueError(f"flax_module={stored.where} has no configuration; it must be a folder")
    stored = stored.of_model(stored.model, stored.config)
    check_dtypes(stored)
    flax_module = stored.abstract(stored.model, stored.config)
    if is_torch(torch_module):
        tensors = {name: as_numpy(tensor) for name, tensor in torch_module.state_dict().items()}
        Checkpoint(f"torch_module={described(torch_module)}", "module", tensors).fitted(flax_module)
        if any(tensor.dtype != tensors[name].dtype for name, tensor in stored.tensors.items()):
            torch_module = copied(torch_module)
            cast_like(torch_module, stored.tensors)
    note = f"Flax keeps the weights of {Path(stored.where).name}"
    return Opened(torch_module, flax_module, Kept(stored.tensors), (*stored.notes, note))
