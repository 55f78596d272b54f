"""Reader of GPT-NeoX checkpoints in the format of `transformers`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmodels.convert.companions import Companions
from jaxmodels.convert.hf.config import DEFAULT_IDS, read_config, read_hf_json
from jaxmodels.convert.hf.names import BASE, READOUT, check_no_adapter, known_names, twin_names
from jaxmodels.convert.neox.layout import hf_name
from jaxmodels.convert.source import Source, check_stored, matched, named
from jaxmodels.io.pretrained import Weights, read_pretrained
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.process.texts import quoted
from jaxmodels.weights.place import Shardings
from jaxmodels.weights.prefixes import prefix_of, proposal, stripped

ARCHITECTURE = "GPTNeoXForCausalLM"
ADAPTER = "adapter_config.json"  # of PEFT, which may be left beside weights that it was merged with


def load_hf(
    folder: str | os.PathLike, dtype: Any = None, shardings: Shardings | None = None, layers: Any = None
) -> NeoX:
    """Load a model from a folder with config.json and weights in safetensors or PyTorch files.

    The other arguments are those of `load_neox`.

    Raises ValueError, naming the file, if one is missing or damaged, if the configuration is not GPT-NeoX's or is not
    supported, or if the tensors do not fit it.
    """
    return open_hf(folder).with_layers(layers).model(dtype, shardings)


def open_hf(folder: str | os.PathLike, *, strip_prefix: str | None = None, variant: str | None = None) -> Source:
    """Open a checkpoint without reading its values.

    strip_prefix: words to remove from the names of tensors, such as "module." or "model.". variant: of the files, such
    as "fp16"; default: none, or the only one if all files are of a variant. Raises ValueError like `load_hf`, with the
    prefix to strip if the names of the tensors have one.
    """
    folder = Path(folder)
    content = read_hf_json(folder / "config.json")
    config, notes = read_config(folder / "config.json")
    architectures = content.get("architectures")
    if not isinstance(architectures, list | None) or not all(isinstance(name, str) for name in architectures or []):
        raise ValueError(
            f"{folder / 'config.json'} has architectures {quoted(architectures)}; expected a list of names"
        )
    weights = read_pretrained(folder, variant, content.get("transformers_weights"))
    check_stored(config, weights.tensors, folder / "config.json")
    tensors, known = weights.tensors, known_names(config)
    if strip_prefix is not None:
        tensors, removed = stripped(tensors, strip_prefix, known, str(weights.file))
        notes += removed
    check_no_adapter(tensors, str(weights.file))
    held = twin_names(tensors, config, str(weights.file))
    if any(key not in held for key in named(config)):
        prefix = prefix_of(tensors, known)
        if prefix is not None:
            raise ValueError(f"{weights.file}: {proposal(tensors, prefix)}")
    check_complete(config, held, weights, architectures)
    found = matched(folder, config, held, hf_name)
    if not any(name.startswith(BASE) for name in tensors):
        notes.append("the names of the tensors have no 'gpt_neox.', as in a file of GPTNeoXModel")
    if (folder / ADAPTER).exists():
        notes.append(f"{ADAPTER} is not read; transformers with peft would add its adapter to the weights")
    layout = f"{kind_of(weights.file)} for transformers"
    companions = Companions.of(folder, defaults=DEFAULT_IDS, published=True)
    files = (folder / "config.json", *{weights.file, *weights.files.values()})
    return Source("hf", folder, config, found, layout, tuple(notes + weights.notes), companions=companions, files=files)


def kind_of(file: Path) -> str:
    """Description of a file or index of weights."""
    kind = "safetensors" if file.name.startswith("model.") or file.suffix == ".safetensors" else "PyTorch files"
    return f"{kind} in shards" if file.suffix == ".json" else kind


def check_complete(
    config: NeoXConfig, held: Mapping[str, Any], weights: Weights, architectures: list[str] | None
) -> None:
    """Raises ValueError, naming the file, if tensors are missing for a reason that can be recognised."""
    missing = [hf_name(key) for key in named(config) if key not in held]
    absent = [name for name in missing if name in weights.files]
    if absent:
        raise ValueError(f"{weights.files[absent[0]]} lacks {absent[0]}, though {weights.file.name} names it there")
    if READOUT not in missing:
        return
    if architectures and ARCHITECTURE not in architectures:
        raise ValueError(
            f"{weights.file} has no {READOUT}, as it is of {quoted(architectures[0])}; supported is {ARCHITECTURE}"
        )
    if len(missing) == 1:
        raise ValueError(
            f"{weights.file} has no {READOUT}: it holds the model without its readout (GPTNeoXModel), or "
            "config.json lacks tie_word_embeddings true"
        )
