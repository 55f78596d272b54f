"""Golden fixtures: PyTorch's results in two files, to check Flax on machines without torch.

    STEM.safetensors   "state/…"                              the weights, in the module's own dtypes
                       "inputs/…", "labels", "targets/…"      arguments of the call, and of the loss
                       "output/…", "parameter gradients/…", "input gradients/…"      the results, in float64
    STEM.json          {"format": 2, "name": …, and the fields below}

"noise" is the rounding noise of these results in float64, and "own values" are PyTorch's values in float32 in units of
float32's, by kind and tensor; see `parity.compare.noise`. "model" is the name and the
configuration from which `jaxmodels.models.build` builds the Flax model; null for a class that is not registered.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.io.atomic import atomic_file
from jaxmodels.io.safetensors import read_file, write_file
from parity.compare.inputs import Inputs
from parity.compare.loss import Kinds
from parity.compare.noise import Noise

FORMAT = 2
KINDS = ("output", "parameter gradients", "input gradients")
SHIPPED = Path(__file__).parent / "fixtures"


@dataclasses.dataclass(frozen=True)
class RecordedParameter:
    """A parameter of the recorded module; a tied one is the same object under all its names."""

    requires_grad: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixture:
    """One recording; it has the methods of `weights.TorchModule`, so that it can replace the PyTorch module.

    model: {"model": name, "config": {…}}. results: by kind, by PyTorch's name. layers: types of the modules that own
    the weights, by path. names: each parameter name, with the first name of the same parameter. torch: its version.
    """

    name: str
    model: dict[str, Any] | None
    inputs: Inputs
    labels: np.ndarray | None
    targets: dict[str, np.ndarray]
    state: dict[str, np.ndarray]
    results: Kinds
    noises: dict[str, dict[str, Noise]]
    own_values: dict[str, dict[str, float]]
    zero_gradients: tuple[str, ...]
    untrained: tuple[str, ...]
    layers: dict[str, str]
    names: dict[str, str]
    torch: str

    def state_dict(self) -> dict[str, np.ndarray]:
        """The weights."""
        return self.state

    def get_submodule(self, path: str, /) -> Any:
        """An object whose type has the name of the module's type."""
        return type(self.layers[path], (), {})()

    def named_parameters(self, *, remove_duplicate: bool = True) -> Iterable[tuple[str, RecordedParameter]]:
        """Parameters by name; a tied one under each of its names if remove_duplicate is False."""
        first = {name: RecordedParameter(name not in self.untrained) for name in self.names.values()}
        return [(n, first[m]) for n, m in self.names.items() if not remove_duplicate or n == m]


def files_of(stem: str | os.PathLike) -> tuple[Path, Path]:
    """STEM.safetensors and STEM.json. A stem may contain dots; it may also be the name of either file."""
    if not isinstance(stem, str | os.PathLike):
        raise ValueError(f"stem={type(stem).__name__} must be a path")
    stem = Path(stem)
    if stem.suffix in (".safetensors", ".json"):
        stem = stem.with_suffix("")
    return stem.with_name(f"{stem.name}.safetensors"), stem.with_name(f"{stem.name}.json")


def write(stem: str | os.PathLike, tensors: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Write both files atomically, the JSON last: without it there is no fixture."""
    tensors_file, about_file = files_of(stem)
    with atomic_file(about_file) as temporary_about:
        temporary_about.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        with atomic_file(tensors_file) as temporary_tensors:
            contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
            write_file(temporary_tensors, contiguous)


def read(stem: str | os.PathLike) -> Fixture:
    """Read a recording; raises ValueError that names the file if one is missing, damaged or of another format."""
    tensors_file, about_file = files_of(stem)
    try:
        about = json.loads(about_file.read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ValueError(f"format={about['format']} must be {FORMAT}; record it again")
        groups: dict[str, dict[str, np.ndarray]] = {}
        for key, tensor in read_file(tensors_file).items():
            kind, _, name = key.partition("/")
            groups.setdefault(kind, {})[name] = np.array(tensor)
        named = groups["inputs"]
        args = tuple(named.pop(f"input {i}") for i in range(about["positional"]))
        return Fixture(
            name=about["name"],
            model=about["model"],
            inputs=Inputs(args, named),
            labels=groups["labels"][""] if "labels" in groups else None,
            targets=groups.get("targets") or {name: np.zeros(()) for name in groups["output"]},
            state=groups.get("state", {}),
            results={kind: groups[kind] for kind in KINDS if kind in groups},
            noises={
                kind: {n: Noise(*map(float, pair)) for n, pair in of.items()} for kind, of in about["noise"].items()
            },
            own_values=about["own values"],
            zero_gradients=tuple(about["zero gradients"]),
            untrained=tuple(about["untrained"]),
            layers=about["layers"],
            names=about["names"],
            torch=about["torch"],
        )
    except FileNotFoundError:
        raise ValueError(f"stem={stem} is not a fixture: {about_file} or {tensors_file} does not exist") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"stem={about_file.with_suffix('')} is not a fixture written by parity.record: {error}"
        ) from error


def stems(folder: str | os.PathLike) -> list[Path]:
    """The fixtures of a folder, sorted; raises ValueError if there are none."""
    found = sorted(file for file in Path(folder).glob("*.json") if files_of(file)[0].is_file())
    if not found:
        raise ValueError(f"folder {folder} contains no fixture; it must contain STEM.json and STEM.safetensors")
    return found
