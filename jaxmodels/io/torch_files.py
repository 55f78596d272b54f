"""PyTorch checkpoint files (.pt), read without running code in them and written atomically."""

import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.io.atomic import atomic_file
from jaxmodels.process.extras import require
from jaxmodels.weights.names import as_tensor


def read_state_dict(file: Path, key: str | None = None) -> dict[str, Any]:
    """Tensors of a .pt file by name, memory-mapped if the file is a zip (written by torch ≥ 1.6).

    key: entry with the state_dict, if the file holds more. Raises ValueError, naming the file, if it is missing,
    truncated, not a checkpoint or not a state_dict, or if it contains code.
    """
    require("torch", "torch")
    import torch

    content = read_pt(file)
    if key is not None:
        if not isinstance(content, Mapping) or key not in content:
            raise ValueError(f"{file} has no entry key={key!r}; it holds {describe(content)}")
        content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise ValueError(f"{file} is not a state_dict; it holds {describe(content)}; choose an entry with --key")
    if not content:
        raise ValueError(f"{file} holds no tensors")
    return dict(content)


def read_pt(file: Path, safe_globals: Sequence[Any] = ()) -> Any:
    """Content of a .pt file, memory-mapped if it is a zip.

    safe_globals: classes and functions that it may refer to besides tensors. Raises ValueError, naming the file, if it
    is missing, truncated or not a checkpoint, or if it contains code.
    """
    require("torch", "torch")
    import torch

    if not file.is_file():
        raise ValueError(f"{file} is not a file")
    try:
        with torch.serialization.safe_globals(list(safe_globals)):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        # The rest of torch's message is dropped: it recommends weights_only=False, which runs the file's code.
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        refers = f": it refers to {named[1]}" if named else ""
        raise ValueError(f"{file} is refused, as it is damaged or holds more than tensors{refers}") from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file} is truncated or not a PyTorch checkpoint: {reason}") from None


def describe(content: Any) -> str:
    """Short description of a file's content for error messages."""
    if isinstance(content, Mapping):
        return "entries " + ", ".join(repr(key) for key in list(content)[:10])
    return f"a {type(content).__name__}"


def write_state_dict(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as a state_dict for `torch.load`, atomically."""
    require("torch", "torch")
    import torch

    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary:
        torch.save({name: as_tensor(array) for name, array in arrays.items()}, temporary)
