"""PyTorch checkpoint files (.pt): read without running anything in them, written whole or not at all."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.convert.params import as_tensor


def read_state_dict(file: Path, key: str | None = None) -> dict[str, Any]:
    """The tensors of a .pt file by name, memory-mapped where the file is a zip (torch ≥ 1.6 writes those).

    `key` names the entry that holds them where the file holds more. Raises ValueError, naming the file, where it is
    missing, truncated, no checkpoint, wants to run code, or holds no tensors at that place.
    """
    import torch

    if not file.is_file():
        raise ValueError(f"{file} is not a file")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{file} is refused: it is no plain checkpoint of tensors ({reason})") from None
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(f"{file} is truncated or no PyTorch checkpoint: {reason}") from None
    if key is not None:
        if not isinstance(content, Mapping) or key not in content:
            raise ValueError(f"{file} has no entry {key!r}; it holds {describe(content)}")
        content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise ValueError(f"{file} is no state_dict; it holds {describe(content)}. Name the entry with --key")
    if not content:
        raise ValueError(f"{file} holds no tensors")
    return dict(content)


def describe(content: Any) -> str:
    if isinstance(content, Mapping):
        return "entries " + ", ".join(repr(key) for key in list(content)[:10])
    return f"a {type(content).__name__}"


def write_state_dict(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as the state_dict that `torch.load` reads, beside the file first and then in its place."""
    import torch

    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.writing")
    try:
        torch.save({name: as_tensor(array) for name, array in arrays.items()}, beside)
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
