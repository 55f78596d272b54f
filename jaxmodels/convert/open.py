"""One way to open a checkpoint: a model folder, a training run, GPT-NeoX shards, a Hugging Face folder, or a Hub id.

What a folder holds is told apart by its content: see `kinds`.
"""

import dataclasses
import functools
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxmodels import models, native
from jaxmodels.convert import hub, kinds
from jaxmodels.convert.companions import MERGES, TOKENIZER, VOCAB, VOCABULARY, Companions
from jaxmodels.convert.flax import open_flax
from jaxmodels.convert.hf import open_hf
from jaxmodels.convert.neox.read import InferredWarning, open_neox
from jaxmodels.convert.source import Source
from jaxmodels.io.atomic import recover
from jaxmodels.io.bounded import TOKENIZER_BYTES, errors_naming, read_object
from jaxmodels.io.checkpoint import read_config, stored_arrays
from jaxmodels.io.content import STEM, holds_safetensors
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.neox.config import DTYPES
from jaxmodels.process.paths import below
from jaxmodels.process.texts import quoted, visible
from jaxmodels.sharding import placement
from jaxmodels.text import SLOW_NAMES, TOKENIZER_NAMES, TokenizerFile, Vocabulary, load_vocabulary
from jaxmodels.weights.names import check_floating
from jaxmodels.weights.place import Shardings
from jaxmodels.weights.precision import choice, is_narrow, say, wide_dtype
from jaxmodels.weights.stored import Stored


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint before its weights are read.

    name: as the user gave it. kind: see `kinds`. folder: local; the snapshot of a Hub id; of a run, the run itself.
    weights: folder of the weights; of a run, that of a step's model. model_name, config: class and arguments, as in
    config.json of this project. opened: the `source`, if it was opened already.
    """

    name: str
    kind: kinds.Kind
    folder: Path
    weights: Path
    companions: Companions
    model_name: str
    config: Mapping[str, Any]
    opened: Source | None = dataclasses.field(default=None, repr=False)

    @functools.cached_property
    def settings(self) -> Mapping[str, Any]:
        """The `config` with the defaults of what a config.json leaves out; raises ValueError if it fits no weights."""
        if self.opened is not None:
            return self.config
        stored = Stored.of(stored_arrays(self.weights))
        found: Mapping[str, Any] = models.abstract(
            self.model_name, self.config, stored, self.weights / "config.json"
        ).config()
        return found

    @property
    def is_quantized(self) -> bool:
        """True if the model was saved with weights in 8 or 4 bits."""
        return any(self.config.get(key) is not None for key in ("int8_threshold", "quantization"))

    @property
    def files(self) -> list[Path]:
        """Files of the configuration, the weights and the companions, as they were opened, which may be links."""
        if self.opened is not None:
            return [*self.opened.files, *self.companions.files.values()]
        parts = [path for path in self.weights.iterdir() if path.name.startswith(STEM)]
        held = [self.weights / "config.json", *parts, *(file for path in parts for file in below(path))]
        return [*held, *self.companions.files.values()]

    @functools.cached_property
    def original(self) -> dict[str, str]:
        """Source and dtype of the checkpoint that a run fine-tuned, by these keys; empty if it is not such a run.

        Raises ValueError, naming the run's config.json, if the dtype is none or the source no string.
        """
        run = kinds.run_above(self.weights)
        found = {} if run is None else read_object(run / "config.json").get("original", {})
        if not isinstance(found, dict):
            raise ValueError(f"{run}/config.json has original={quoted(found)}, must be an object")
        given = found.get("dtype")
        if found and given not in DTYPES:
            raise ValueError(f"{run}/config.json has original dtype {quoted(given)}, must be one of {DTYPES}")
        if not isinstance(found.get("source"), str | None):
            raise ValueError(f"{run}/config.json has original source {quoted(found['source'])}, must be a string")
        return found

    @functools.cached_property
    def source(self) -> Source | None:
        """Lazy tensors of a NeoX; None for another model, and for a quantized one.

        Weights that Orbax wrote are read when this is first used. Raises ValueError if they are damaged.
        """
        if self.opened is not None or self.model_name != "NeoX" or self.is_quantized:
            return self.opened
        return dataclasses.replace(open_flax(self.weights), companions=self.companions)

    def neox(self) -> Source:
        """The `source`; raises ValueError if the checkpoint is not a NeoX, or is quantized."""
        if self.model_name != "NeoX":
            raise ValueError(f"{self.name} holds a {self.model_name}, not a NeoX")
        if self.source is None:
            raise ValueError(f"{self.name} is quantized; name the model it was made from")
        return self.source

    def model(self, *, dtype: Any = None, shardings: Shardings | Mesh | None = None) -> Any:
        """Read the weights; arguments and errors are those of `load`.

        A NeoX of another format has stacked layers. Emits InferredWarning if shards do not store their configuration.
        """
        if dtype is not None:
            check_floating(dtype)
        if self.kind in ("model", "run"):
            return models.load(self.weights, dtype=dtype, shardings=shardings)
        source = self.neox()
        for doubt in source.doubts:
            warnings.warn(visible(doubt), InferredWarning, stacklevel=3)
        with errors_naming(self.name):
            return source.model(dtype, placement(NeoX, shardings) if isinstance(shardings, Mesh) else shardings)

    def compute_dtype(self, override: str = "--dtype", *, narrow: bool = False) -> str | None:
        """Name of the dtype to load the weights in for inference if none was asked for; None to keep their own.

        On a CPU it is float32 for weights in 16 bits, which is said in a line on standard error with `override`, the
        way to choose another one; see `jaxmodels.weights.precision`. A configuration's own compute dtype is kept.
        narrow: return None for a NeoX that can be `narrowed` once it is loaded.
        """
        if is_narrow(self.config.get("dtype")):
            return None
        stored = stored_arrays(self.weights) if self.opened is None else self.opened.tensors
        found = wide_dtype(stored, jax.default_backend())
        if found is None or (narrow and self.model_name == "NeoX" and not self.is_quantized and native.available()):
            return None
        say(choice([array.dtype for array in stored.values()], override))
        return found

    def vocabulary(self, tokenizer: str | os.PathLike | None = None) -> Vocabulary:
        """Vocabulary of the given file (tokenizer.json, or vocabulary.json of a run), else the checkpoint's own.

        Its `eos` are the checkpoint's end tokens, if it names any. Raises ValueError, with the places that were
        searched, if there is none.
        """
        vocabulary, eos = self.found_vocabulary(tokenizer), self.companions.token_ids.eos
        return dataclasses.replace(vocabulary, eos=eos) if eos and isinstance(vocabulary, TokenizerFile) else vocabulary

    def found_vocabulary(self, tokenizer: str | os.PathLike | None) -> Vocabulary:
        """Vocabulary as its file has it."""
        if tokenizer is not None:
            file = Path(tokenizer)
            if file.is_dir():
                return TokenizerFile.read(file)
            if not file.is_file():
                raise ValueError(f"tokenizer={str(file)!r} is not a file")
            return read_vocabulary(file)
        found = self.vocabulary_file
        if found is None and any((self.folder / name).is_file() for name in SLOW_NAMES):
            return TokenizerFile.read(self.folder)
        if found is None:
            searched = [*(self.folder / name for name in (*TOKENIZER_NAMES, VOCABULARY)), *self.above]
            raise ValueError(f"no tokenizer found for {self.name}; looked for {', '.join(map(str, searched))}")
        return TokenizerFile.read(found) if found.name == VOCAB else read_vocabulary(found)

    @property
    def vocabulary_file(self) -> Path | None:
        """File of the checkpoint's own vocabulary; None if it has none, or only those of other kinds of tokenizers."""
        names = (TOKENIZER, VOCABULARY) if self.kind == "hf" else (VOCABULARY, TOKENIZER)
        places = [self.companions.files[name] for name in names if name in self.companions.files]
        if not places and {VOCAB, MERGES} <= self.companions.files.keys():
            return self.companions.files[VOCAB]
        return next((place for place in (*places, *self.above) if place.is_file()), None)

    @property
    def above(self) -> list[Path]:
        """Tokenizer files that may lie beside the checkpoint's folder."""
        return [self.folder.absolute().parent / name for name in TOKENIZER_NAMES]


def read_vocabulary(file: Path) -> Vocabulary:
    """Vocabulary in a file that a run or a tokenizer library wrote."""
    known = read_object(file, TOKENIZER_BYTES).keys() & {"characters", "bytes", "tokenizer"}
    return load_vocabulary(file) if known else TokenizerFile.read(file)


def open_source(
    source: str | os.PathLike,
    *,
    config: NeoXConfig | None = None,
    row_bias: str | None = None,
    revision: str | None = None,
    strip_prefix: str | None = None,
    variant: str | None = None,
) -> Opened:
    """Open a checkpoint of any kind without reading its weights.

    source: a folder, or a Hub id such as "EleutherAI/pythia-70m", unless there is a folder of that name.
    config, row_bias: for GPT-NeoX's shards, as in `load_neox`.
    revision: branch, tag or commit of a Hub id.
    strip_prefix: words to remove from the names of tensors, such as "module."; for Hugging Face folders and shards.
    variant: for Hugging Face folders: "fp16" reads model.fp16.safetensors.

    Raises ValueError if it is no checkpoint or cannot be loaded, with a sentence on what it is, or if an argument does
    not apply to its kind. Warns if later checkpoints of a run are skipped because they are incomplete.
    """
    name = os.fspath(source)
    if not name:
        raise ValueError("source='' must be a folder, or the id of a model on the Hub")
    folder = local_folder(name, revision, variant)
    place = kinds.find(folder)
    given: dict[str, tuple[Any, tuple[kinds.Kind, ...]]] = {
        "config": (config, ("neox",)),
        "row_bias": (row_bias, ("neox",)),
        "strip_prefix": (strip_prefix, ("hf", "neox")),
        "variant": (variant, ("hf",)),
    }
    for argument, (value, allowed) in given.items():
        if value is not None and place.kind not in allowed:
            flag, names = argument.replace("_", "-"), " or ".join(kinds.NAMES[kind] for kind in allowed)
            raise ValueError(f"{argument} (--{flag}) is for {names} folders; {name} is a {kinds.NAMES[place.kind]}")
    if place.kind in ("neox", "hf"):
        if place.kind == "neox":
            opened = open_neox(place.folder, config, row_bias, strip_prefix)
            opened = dataclasses.replace(opened, companions=Companions.of(*place.beside))
        else:
            kinds.check_weights(place.folder, variant)
            opened = open_hf(place.folder, strip_prefix=strip_prefix, variant=variant)
        fields = dataclasses.asdict(opened.config)
        return Opened(name, place.kind, place.folder, place.folder, opened.companions, "NeoX", fields, opened)
    if place.kind == "run" and not (place.folder / "checkpoints").is_dir():
        raise ValueError(f"{name} is a training run that has no checkpoint yet")
    weights = models.model_folder(place.folder) if place.step is None else place.step / "model"
    model_name, fields = read_config(weights)
    holds_safetensors(weights)  # raises if it has no weights, or two
    if model_name == "LoRANeoX":  # merged on loading
        model_name, fields = "NeoX", {key: value for key, value in fields.items() if key != "lora"}
    return Opened(name, place.kind, place.folder, weights, Companions.of(*place.beside), model_name, fields)


def local_folder(name: str, revision: str | None = None, variant: str | None = None) -> Path:
    """Folder of a source: the path itself, or the snapshot of a Hub id, which is downloaded if needed.

    Recovers a folder that a killed process was replacing.
    """
    path = Path(os.path.expanduser(name))
    recover(path)
    if not path.exists():
        hub.check_not_address(name)
    if not is_remote(name):
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for ids of the Hub; {name} is not one")
        return path
    return hub.download(name, revision, variant)


def is_remote(name: str) -> bool:
    """True for a source that is looked up on the Hub: an id, and no path of a file or folder."""
    path = Path(os.path.expanduser(name))
    return hub.is_id(name) and not path.exists() and not path.is_symlink()


def load(
    source: str | os.PathLike,
    *,
    dtype: Any = None,
    shardings: Shardings | Mesh | None = None,
    revision: str | None = None,
    config: NeoXConfig | None = None,
    row_bias: str | None = None,
    strip_prefix: str | None = None,
    variant: str | None = None,
) -> Any:
    """Load a model: a folder of `jaxmodels.save`, a training run, GPT-NeoX shards, a Hugging Face folder, or a Hub id.

    source: of a run the last complete checkpoint is used, or the step that is named. See `open_source` for it and for
        revision, config, row_bias, strip_prefix and variant.
    dtype: cast floating arrays; default the dtypes in which they were saved.
    shardings: a mesh, on which the class's own `sharding_rules` distribute the arrays; or a function of path and shape
        to a Sharding. Each device's part is read separately. Default: the default device.

    Raises ValueError if the source cannot be loaded or is damaged, if its arrays do not fit its configuration, if a
    value overflows in `dtype`, if the mesh does not fit, or if arrays are float64 and jax_enable_x64 is off (set it by
    jax.config.update: `with jax.enable_x64(True)` does not reach Orbax's threads).
    """
    settings = {"config": config, "row_bias": row_bias, "strip_prefix": strip_prefix, "variant": variant}
    opened = open_source(source, revision=revision, **settings)  # type: ignore[arg-type]
    return opened.model(dtype=dtype, shardings=shardings)
