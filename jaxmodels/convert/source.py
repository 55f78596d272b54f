"""`Source`: an opened GPT-NeoX checkpoint of any format, whose values are read when they are used."""

import dataclasses
import functools
import numbers
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.convert.companions import Companions
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.neox.config import DTYPES
from jaxmodels.weights.lazy import Cast, Cut, nbytes
from jaxmodels.weights.names import entries, flat_arrays, listed
from jaxmodels.weights.place import Shardings, load_tensors, tensors_of
from jaxmodels.weights.stored import Stored, shapes_of

VOCABULARY = ("embedding.emb.weight", "readout.linear.weight")  # a row per token


@dataclasses.dataclass(frozen=True)
class Source:
    """Configuration and lazy tensors of a checkpoint.

    tensors: by the names of the PyTorch twin, in the order of the model's parts. layout: description of the files.
    notes: statements for the user, e.g. about inferred values. doubts: the notes that may be wrong. companions: what is
    written beside the tensors in every format. files: those of the configuration and of the tensors, as they were
    opened, which may be links.
    """

    format: str
    folder: Path
    config: NeoXConfig
    tensors: Mapping[str, Any] = dataclasses.field(repr=False)
    layout: str = ""
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    companions: Companions = dataclasses.field(default_factory=Companions)
    files: tuple[Path, ...] = dataclasses.field(default=(), repr=False)

    def model(self, dtype: Any = None, shardings: Shardings | None = None) -> NeoX:
        """Model with stacked layers; arguments and errors are those of `load_tensors`."""
        return load_tensors(abstract(self.config), self.tensors, dtype, shardings, self.folder.name)

    def cast(self, dtype: Any) -> "Source":
        """Checkpoint with tensors cast to a dtype."""
        tensors = {name: Cast(tensor, np.dtype(dtype), name) for name, tensor in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors)

    def with_vocabulary(self, n_vocab: int) -> "Source":
        """Checkpoint with the first n_vocab rows of the vocabulary; raises ValueError if it has fewer."""
        if not 1 <= n_vocab <= self.config.n_vocab:
            raise ValueError(f"n_vocab={n_vocab} must be from 1 to the {self.config.n_vocab} rows of the vocabulary")
        config = dataclasses.replace(self.config, n_vocab=n_vocab)
        cut = {key: Cut(self.tensors[key], 0, 0, n_vocab) for key in VOCABULARY if key in self.tensors}
        return dataclasses.replace(self, config=config, tensors={**self.tensors, **cut})

    def with_layers(self, layers: Sequence[int] | None) -> "Source":
        """Checkpoint with some of the blocks, by number, in that order; embedding, norm and readout are kept.

        Raises ValueError if a block does not exist or occurs twice.
        """
        if layers is None:
            return self
        n = self.config.n_layers
        given, layers = layers, [] if isinstance(layers, str) or not isinstance(layers, Iterable) else list(layers)
        integers = all(isinstance(layer, numbers.Integral) and not isinstance(layer, bool) for layer in layers)
        if not layers or not integers or len(set(layers)) < len(layers) or not all(0 <= layer < n for layer in layers):
            raise ValueError(f"layers={given!r} must be different integers from 0 to {n - 1}, at least one")
        config = dataclasses.replace(self.config, n_layers=len(layers))
        tensors = {key: self.tensors[numbered(key, layers)] for key in named(config)}
        return dataclasses.replace(self, config=config, tensors=tensors)

    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(map(nbytes, self.tensors.values()))


def check_stored(config: NeoXConfig, tensors: Mapping[str, Any], where: str | os.PathLike) -> None:
    """Raises ValueError, beginning with `where`, if a configuration is far larger than the tensors that are stored.

    Nothing of the model is made, which would take minutes for a configuration of a million layers.
    """
    Stored.of(tensors).check(Stored(config.tensors(), config.parameters()), str(where))


@functools.lru_cache(maxsize=4)  # tracing a model takes longer than opening its files
def abstract(config: NeoXConfig) -> NeoX:
    """Abstract model: shapes and dtypes without values. Cached, so not to be modified."""
    return shapes_of(lambda rngs: NeoX(config, rngs=rngs))


@functools.lru_cache(maxsize=4)
def named(config: NeoXConfig) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of all tensors, in the order of the model's parts: embedding, blocks, final norm, readout."""
    arrays = flat_arrays(abstract(config))
    found = {entry.key: entry.torch_shape(arrays[entry.path].shape) for entry in entries(arrays)}
    return types.MappingProxyType({key: found[key] for key in sorted(found, key=part)})


def part(key: str) -> tuple[int, int]:
    """Sort key of a tensor's name: its part of the model, and its layer."""
    words = key.split(".")
    layer = int(words[1]) if words[0] == "layers" else 0
    return ("embedding", "layers", "final_norm", "readout").index(words[0]), layer


def numbered(key: str, layers: Sequence[int]) -> str:
    """Name of the tensor that becomes `key` if only these blocks are kept."""
    words = key.split(".")
    if words[0] == "layers":
        words[1] = str(layers[int(words[1])])
    return ".".join(words)


def matched(
    folder: Path, config: NeoXConfig, held: Mapping[str, Any], disk_name: Callable[[str], str] = str
) -> dict[str, Any]:
    """Tensors of a configuration, in order, from the tensors that a folder holds.

    disk_name: function of a tensor's name to that on disk, for error messages. Raises ValueError that counts tensors
    that are missing, unexpected, misshapen or not of a floating type of DTYPES.
    """
    wanted = named(config)
    problems = [f"missing {disk_name(key)}" for key in wanted if key not in held]
    problems += [f"unexpected {key}" for key in held if key not in wanted]
    unusable: dict[str, list[str]] = {}
    for key in [key for key in wanted if key in held]:
        if tuple(held[key].shape) != wanted[key]:
            problems.append(f"{disk_name(key)} has shape {list(held[key].shape)}, expected {list(wanted[key])}")
        name = np.dtype(held[key].dtype).name
        if name not in DTYPES:
            unusable.setdefault(name, []).append(disk_name(key))
    for name, keys in unusable.items():
        reason = "float8 weights are not supported" if name.startswith("float8") else "which is not floating"
        more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
        problems.append(f"{keys[0]}{more} is {name}, {reason}")
    if problems:
        raise ValueError(f"{folder} does not hold the tensors of its configuration: {listed(problems)}")
    return {key: held[key] for key in wanted}


def model_source(model: NeoX) -> Source:
    """Source of a model in memory; raises ValueError if it is not a NeoX, is quantized, or lacks blocks."""
    if not isinstance(model, NeoX):
        raise ValueError(f"model is a {type(model).__name__}, not a NeoX")
    if model.quantization is not None:
        raise ValueError("model is quantized; only jaxmodels.save writes quantized weights")
    folder = Path("model")
    return Source("model", folder, model.settings, matched(folder, model.settings, tensors_of(model)))
