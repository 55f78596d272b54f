"""`Checkpoint`: the stored weights of one of the project's models, from disk or from memory.

    a mapping                  a state_dict: tensors or arrays by name
    FILE.pt, FILE.safetensors  the same in a file; a .pt file may have it as one of several entries
    FOLDER                     a model that `jaxmodels.save` wrote, or a training run; GPT-NeoX's shards; a GPT-NeoX in
                               Hugging Face's format
    ORG/NAME                   the same on the Hub

Only a folder has a configuration. A state_dict and a file have that of the model on the other side.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxmodels.convert.hf import twin_names
from jaxmodels.convert.hub import is_id
from jaxmodels.convert.kinds import find
from jaxmodels.convert.neox.shards import config_files, find_step
from jaxmodels.convert.open import local_folder, open_source
from jaxmodels.convert.operations import float64_allowed
from jaxmodels.io.allowance import Allowance
from jaxmodels.io.bounded import errors_naming
from jaxmodels.io.formats.safetensors import read_file
from jaxmodels.io.formats.torch_files import read_pt, stand_ins, state_dict_of
from jaxmodels.models import abstract
from jaxmodels.neox import NeoXConfig
from jaxmodels.process.texts import quoted
from jaxmodels.weights.names import ConversionError, as_numpy, check_fit, flat_arrays, to_torch
from jaxmodels.weights.stored import Stored

HF = "hf"  # value of Checkpoint.format


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights of a model, and its configuration if that is stored with them.

    where: the file or folder. format: 'hf', 'neox', 'flax' (folders) or 'tensors'. tensors: by name, those of a folder
    by the names of the PyTorch twin; their values may be read when they are used. model, config: name and arguments of
    the registered class; empty if they are not stored. notes: statements for the user.
    """

    where: str
    format: str
    tensors: Mapping[str, Any] = dataclasses.field(repr=False)
    model: str = ""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def of_model(self, model: str, config: Mapping[str, Any]) -> "Checkpoint":
        """The same weights by the names of a model's twin, and with its configuration if they have none of their own.

        Raises ValueError listing every tensor that is missing, unexpected or misshapen, and if the checkpoint is of
        another model or quantized.
        """
        if self.model not in ("", model):
            raise ValueError(f"{self.where} holds a {self.model}, not a {model}")
        config = self.config if self.model else config
        if any(config.get(key) is not None for key in ("int8_threshold", "quantization")):
            raise ValueError(f"{self.where}: the model is quantized; compare its weights before that")
        return dataclasses.replace(self, model=model, config=config, tensors=self.fitted(self.abstract(model, config)))

    def abstract(self, model: str, config: Mapping[str, Any]) -> Any:
        """A registered Flax model with shapes only; raises ValueError if it is far larger than the tensors."""
        return abstract(model, config, Stored.of(self.tensors), self.where)

    def fitted(self, flax_module: Any) -> dict[str, Any]:
        """The tensors by the twin's names; raises ValueError listing those that do not fit a Flax model."""
        tensors = dict(self.tensors)
        try:
            neox = isinstance(getattr(flax_module, "settings", None), NeoXConfig)
            if self.format == "tensors" and neox and any(name.startswith("gpt_neox.") for name in tensors):
                tensors = twin_names(tensors, flax_module.settings, self.where)
            elif self.format == "tensors" and hasattr(flax_module, "adapted"):
                tensors = dict(flax_module.adapted(tensors))
            with jax.enable_x64(True):  # 64-bit tensors are refused without it
                check_fit(flat_arrays(flax_module), tensors, None)
        except ConversionError as error:
            raise ValueError(f"{self.where}: {error}") from None
        return tensors


Source = str | os.PathLike | Mapping[str, Any] | Checkpoint


def is_stored(given: Any) -> bool:
    """True for a path and for a checkpoint that is open."""
    return isinstance(given, str | os.PathLike | Checkpoint)


def is_source(given: Any) -> bool:
    """True for what `opened` takes."""
    return is_stored(given) or isinstance(given, Mapping)


def opened(
    source: Source, config: NeoXConfig | None = None, row_bias: str | None = None, default: NeoXConfig | None = None
) -> Checkpoint:
    """Open a checkpoint of any form; raises ValueError, naming the file, if it is missing, damaged or something else.

    config, row_bias: for GPT-NeoX's shards, as in `load_neox`. default: their configuration if they store none.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, Mapping):
        return Checkpoint("the state_dict", "tensors", state_dict(source))
    path = Path(source)
    if path.is_dir() or (not path.exists() and is_id(os.fspath(source))):
        return opened_folder(local_folder(os.fspath(source)), config, row_bias, default)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        return Checkpoint(str(path), "tensors", read_file(path))
    with errors_naming(path):
        return opened_pt(path)


def opened_pt(path: Path) -> Checkpoint:
    """Open a PyTorch file with a state_dict; see `opened`."""
    allowance = Allowance([path])
    content = read_pt(path, stand_ins(), allowance)
    held = [key for key, value in content.items() if is_state_dict(value)] if isinstance(content, Mapping) else []
    if len(held) == 1:  # with an optimizer's state, a step, and so on
        note = f"the state_dict is the entry {quoted(held[0])} of {path.name}"
        return Checkpoint(
            str(path), "tensors", state_dict(state_dict_of(path, content, allowance, held[0])), notes=(note,)
        )
    return Checkpoint(str(path), "tensors", state_dict(state_dict_of(path, content, allowance)))


def is_state_dict(value: Any) -> bool:
    """True for a mapping of names to tensors that is not empty."""
    return isinstance(value, Mapping) and bool(value) and all(hasattr(tensor, "dtype") for tensor in value.values())


def state_dict(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors as NumPy arrays that share their memory; raises ValueError if one is no tensor."""
    others = [str(name) for name, value in tensors.items() if not (hasattr(value, "dtype") and hasattr(value, "shape"))]
    if others or not tensors:
        found = f"{', '.join(others[:5])} {'is' if len(others) == 1 else 'are'} not" if others else "it is empty"
        raise ValueError(f"torch_module={type(tensors).__name__}: a state_dict must map names to tensors; {found}")
    arrays = {}
    for name, tensor in tensors.items():
        with errors_naming(quoted(name)):
            arrays[str(name)] = as_numpy(tensor)
    return arrays


def opened_folder(
    folder: Path, config: NeoXConfig | None, row_bias: str | None, default: NeoXConfig | None
) -> Checkpoint:
    """Open a folder; see `opened`."""
    notes: tuple[str, ...] = ()
    bare = config is None and find(folder).kind == "neox" and not config_files(folder, find_step(folder))
    if bare and default is not None:
        config, notes = default, (f"{folder} stores no configuration; the other side's was used",)
    found = open_source(folder, config=config, row_bias=row_bias)
    if found.kind in ("model", "run"):
        with float64_allowed():
            return Checkpoint(str(folder), "flax", to_torch(found.model()), found.model_name, found.settings)
    source = found.neox()
    fields = dataclasses.asdict(source.config)
    return Checkpoint(str(folder), source.format, source.tensors, "NeoX", fields, (*source.notes, *notes))
