"""PyTorch checkpoint files (.pt): read without running anything in them, written whole or not at all."""

import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.extras import require
from jaxmodels.io.atomic import atomic_file
from jaxmodels.weights.names import as_tensor


def read_state_dict(file: Path, key: str | None = None) -> dict[str, Any]:
    """The tensors of a .pt file by name, memory-mapped where the file is a zip (torch ≥ 1.6 writes those).

    `key` names the entry that holds them where the file holds more. Raises ValueError, naming the file, where it is
    missing, truncated, no checkpoint, wants to run code, or holds no tensors at that place.
    """
    require("torch", "torch")
    import torch

    content = read_pt(file)
    if key is not None:
        if not isinstance(content, Mapping) or key not in content:
            raise ValueError(f"{file} has no entry {key!r}; it holds {describe(content)}")
        content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise ValueError(f"{file} is no state_dict; it holds {describe(content)}. Name the entry with --key")
    if not content:
        raise ValueError(f"{file} holds no tensors")
    return dict(content)


def read_pt(file: Path, safe_globals: Sequence[Any] = ()) -> Any:
    """What a .pt file holds, memory-mapped where it is a zip. `safe_globals`: what it may name beside tensors.

    Raises ValueError, naming the file, where it is missing, truncated, no checkpoint, or wants to run code.
    """
    require("torch", "torch")
    import torch

    if not file.is_file():
        raise ValueError(f"{file} is not a file")
    try:
        with torch.serialization.safe_globals(list(safe_globals)):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        # torch's own text tells how to run the file after all; what it names is all that is wanted of it.
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        wants = f": it asks for {named[1]}" if named else ""
        raise ValueError(f"{file} is refused: it is damaged, or more than tensors{wants}") from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file} is truncated or no PyTorch checkpoint: {reason}") from None


def describe(content: Any) -> str:
    if isinstance(content, Mapping):
        return "entries " + ", ".join(repr(key) for key in list(content)[:10])
    return f"a {type(content).__name__}"


def write_state_dict(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as the state_dict that `torch.load` reads, beside the file first and then in its place."""
    require("torch", "torch")
    import torch

    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as beside:
        torch.save({name: as_tensor(array) for name, array in arrays.items()}, beside)
