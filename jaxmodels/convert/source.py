"""A checkpoint of a GPT-NeoX model that is open, but not read: the same, whatever its format."""

import dataclasses
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.weights.lazy import Cast, Cut, nbytes
from jaxmodels.weights.names import entries, flat_arrays, is_floating
from jaxmodels.weights.place import Shardings, load_tensors, tensors_of

VOCABULARY = ("embedding.emb.weight", "readout.linear.weight")  # a row for each token


@dataclasses.dataclass(frozen=True)
class Source:
    """`tensors` are lazy, by the names of the PyTorch twin, in the order of the model's parts.

    `layout` says how they lie on disk, `notes` what was inferred rather than read, and `doubts`, all of them among the
    notes, what may well be wrong. `token_ids` are those of special tokens, for formats that keep them.
    """

    format: str
    folder: Path
    config: NeoXConfig
    tensors: Mapping[str, Any] = dataclasses.field(repr=False)
    layout: str = ""
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    token_ids: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def model(self, dtype: Any = None, shardings: Shardings | None = None) -> NeoX:
        """The model, its layers stacked; arguments and errors as `load_tensors` has them."""
        return load_tensors(abstract(self.config), self.tensors, dtype, shardings, self.folder.name)

    def cast(self, dtype: Any) -> "Source":
        """The same in another dtype."""
        tensors = {name: Cast(tensor, np.dtype(dtype), name) for name, tensor in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors)

    def with_vocabulary(self, n_vocab: int) -> "Source":
        """The checkpoint without the rows behind n_vocab. Raises ValueError where there are fewer."""
        if not 1 <= n_vocab <= self.config.n_vocab:
            raise ValueError(f"the vocabulary has {self.config.n_vocab} rows, of which {n_vocab} cannot be kept")
        config = dataclasses.replace(self.config, n_vocab=n_vocab)
        cut = {key: Cut(self.tensors[key], 0, 0, n_vocab) for key in VOCABULARY if key in self.tensors}
        return dataclasses.replace(self, config=config, tensors={**self.tensors, **cut})

    def with_layers(self, layers: Sequence[int] | None) -> "Source":
        """The checkpoint of some of the blocks, by number, in that order; embedding, norm and readout stay.

        Raises ValueError for a block that is not there, or is named twice.
        """
        if layers is None:
            return self
        n = self.config.n_layers
        given, layers = layers, [] if isinstance(layers, str) or not isinstance(layers, Iterable) else list(layers)
        whole = all(isinstance(layer, numbers.Integral) and not isinstance(layer, bool) for layer in layers)
        if not layers or not whole or len(set(layers)) < len(layers) or not all(0 <= layer < n for layer in layers):
            raise ValueError(f"layers={given!r} must be different whole numbers from 0 to {n - 1}, at least one")
        config = dataclasses.replace(self.config, n_layers=len(layers))
        tensors = {key: self.tensors[numbered(key, layers)] for key in named(config)}
        return dataclasses.replace(self, config=config, tensors=tensors)

    def nbytes(self) -> int:
        return sum(map(nbytes, self.tensors.values()))


def abstract(config: NeoXConfig) -> NeoX:
    """The model without values."""
    return nnx.eval_shape(lambda: NeoX(config, rngs=nnx.Rngs(0)))


def named(config: NeoXConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape, in the order of the model's parts: embedding, blocks, final norm, readout."""
    arrays = flat_arrays(abstract(config))
    found = {entry.key: entry.torch_shape(arrays[entry.path].shape) for entry in entries(arrays)}
    return {key: found[key] for key in sorted(found, key=part)}


def part(key: str) -> tuple[int, int]:
    words = key.split(".")
    layer = int(words[1]) if words[0] == "layers" else 0
    return ("embedding", "layers", "final_norm", "readout").index(words[0]), layer


def numbered(key: str, layers: Sequence[int]) -> str:
    """The name of the tensor that becomes `key` when only these blocks are kept."""
    words = key.split(".")
    if words[0] == "layers":
        words[1] = str(layers[int(words[1])])
    return ".".join(words)


def matched(
    folder: Path, config: NeoXConfig, held: Mapping[str, Any], called: Callable[[str], str] = str
) -> dict[str, Any]:
    """Exactly the tensors of the configuration, in order; `called` gives a tensor's name on disk.

    Raises ValueError that lists every one that is missing, unexpected, misshapen or no floating type.
    """
    wanted = named(config)
    problems = [f"missing {called(key)}" for key in wanted if key not in held]
    problems += [f"unexpected {key}" for key in held if key not in wanted]
    for key in [key for key in wanted if key in held]:
        if tuple(held[key].shape) != wanted[key]:
            problems.append(f"{called(key)} has shape {list(held[key].shape)}, expected {list(wanted[key])}")
        if not is_floating(held[key].dtype):
            problems.append(f"{called(key)} is {held[key].dtype}, no floating type")
    if problems:
        raise ValueError(f"{folder} does not hold the tensors of its configuration:\n  " + "\n  ".join(problems))
    return {key: held[key] for key in wanted}


def model_source(model: NeoX) -> Source:
    """A model in memory. Raises ValueError where it is none, is quantised, or has not its configuration's blocks."""
    if not isinstance(model, NeoX):
        raise ValueError(f"model is a {type(model).__name__}, not a NeoX")
    if model.int8_threshold is not None:
        raise ValueError("the model is quantised: only jaxmodels.save keeps int8 weights; write the one it was made of")
    folder = Path("the model")
    return Source("model", folder, model.settings, matched(folder, model.settings, tensors_of(model)))
