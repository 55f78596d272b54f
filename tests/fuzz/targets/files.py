"""Single files of tensors."""

from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.targets.kind import Target


def make_pt(folder: Path, old: bool = False) -> None:
    import torch

    tensors = {"a": torch.arange(15.0).view(3, 5), "b.c": torch.zeros(7, dtype=torch.bfloat16)}
    tensors["tied"] = tensors["a"].t()
    torch.save(tensors, folder / "model.pt", _use_new_zipfile_serialization=not old)


def make_checkpoint(folder: Path, old: bool = False) -> None:
    """A training checkpoint with the weights in one of its entries."""
    import torch

    weights = {"a": torch.arange(15.0).view(3, 5), "b": torch.nn.Parameter(torch.ones(3))}
    state = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(3, 5)}}, "param_groups": [{"lr": 0.1}]}
    rng = np.random.RandomState(0).get_state()
    content = {"state_dict": weights, "optimizer": state, "epoch": 7, "rng": rng, "note": "text", "best": np.float64(1)}
    torch.save(content, folder / "model.pt", _use_new_zipfile_serialization=not old)


def read_pt(folder: Path) -> Any:
    from jaxmodels.io.formats.torch_files import read_state_dict

    return {name: tensor.clone() for name, tensor in read_state_dict(folder / "model.pt").items()}


def read_tensors(folder: Path) -> Any:
    from jaxmodels.io.formats.torch_files import read_tensors

    return {name: np.array(array) for name, array in read_tensors(folder / "model.pt")[0].items()}


def make_safetensors(folder: Path) -> None:
    from jaxmodels.io.formats.safetensors import write_file

    tensors = {"a": np.arange(15.0).reshape(3, 5), "b": np.zeros(7, np.float16), "c": np.zeros((0, 3), np.int8)}
    write_file(folder / "model.safetensors", tensors)


def read_safetensors(folder: Path) -> Any:
    from jaxmodels.io.formats.safetensors import read_file

    return {name: np.array(tensor) for name, tensor in read_file(folder / "model.safetensors").items()}


def make_npy(folder: Path) -> None:
    np.save(folder / "array.npy", np.arange(15, dtype=np.int32).reshape(3, 5))


def read_npy(folder: Path) -> Any:
    from jaxmodels.io.formats.npy import map_array

    return np.array(map_array(folder / "array.npy"))


TARGETS = (
    Target("pt", make_pt, read_pt),
    Target("pt, old", lambda folder: make_pt(folder, old=True), read_pt),
    Target("pt with entries", make_checkpoint, read_tensors),
    Target("pt with entries, old", lambda folder: make_checkpoint(folder, old=True), read_tensors),
    Target("safetensors", make_safetensors, read_safetensors),
    Target("npy", make_npy, read_npy),
)
