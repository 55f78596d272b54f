"""Weights in a folder as transformers writes them: safetensors or PyTorch files, single or in shards, and variants.

    model.safetensors                    before an index, also one of other files
    model.safetensors.index.json         {"metadata": {}, "weight_map": {tensor: file}}, tensors in shards
    pytorch_model.bin
    pytorch_model.bin.index.json

The first that exists is read, as transformers does. A variant has its name in the file's: model.fp16.safetensors,
model.safetensors.index.fp16.json.
"""

import fnmatch
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxmodels.io.allowance import Allowance, check_distinct
from jaxmodels.io.bounded import read_json
from jaxmodels.io.formats.safetensors import read_file
from jaxmodels.io.formats.torch_files import read_tensors
from jaxmodels.process.texts import quoted
from jaxmodels.weights.prefixes import shown

SINGLE, INDEX = ("model.safetensors", "pytorch_model.bin"), ".index.json"
NAME = re.compile(r"(?:model\.(?:(.+)\.)?safetensors|pytorch_model\.(?:(.+)\.)?bin)")
INDEX_NAME = re.compile(r"(?:model\.safetensors|pytorch_model\.bin)\.index\.(?:(.+)\.)?json")
SHARD = re.compile(r"-\d+-of-\d+\.")  # model-00001-of-00002.fp16.safetensors, or with the variant before the number
LONGEST = 1000  # characters of the path of a file in its folder
OTHERS = ("*.safetensors", "*.bin", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.pt", "*.pth", "*.ckpt")


class Weights(NamedTuple):
    """Tensors of a folder by name, memory-mapped.

    file: the file or index that was read. files: the file of each tensor, also of those that the index names and that
    are absent.
    """

    tensors: dict[str, Any]
    file: Path
    files: Mapping[str, Path]
    notes: list[str]


def read_pretrained(folder: Path, variant: str | None = None, name: Any = None) -> Weights:
    """Read the weights of a folder.

    variant: such as 'fp16'; default: none, or the only one if all files are of a variant. name: a file or index, as the
    key `transformers_weights` of a config.json gives it.

    Raises ValueError, naming the file, if there are no weights, or if a file is missing, damaged or not supported.
    """
    file, notes = weights_file(folder, variant) if name is None else (inside(folder, name, folder), [])
    if file.suffix == ".json":
        return read_shards(folder, file, notes)
    tensors = read_one(file, notes, Allowance([file]))
    return Weights(tensors, file, dict.fromkeys(tensors, file), notes)


def weights_file(folder: Path, variant: str | None) -> tuple[Path, list[str]]:
    """File or index to read, with notes on the choice; raises ValueError if there is none."""
    name, notes = chosen([path.name for path in folder.iterdir() if path.is_file()], variant, str(folder))
    return folder / name, notes


def chosen(names: Collection[str], variant: str | None, where: str) -> tuple[str, list[str]]:
    """Name of the file or index to read among those of a folder, with notes on the choice.

    where: the folder, for errors. Raises ValueError, with the variants that there are, if there is none.
    """
    notes = []
    held = variants(names)
    if variant is None and None not in held and len(held) == 1:
        variant = next(iter(held))
        notes.append(f"all files are of the variant {variant!r}, which was read")
    if variant in held:
        file = held[variant]
        index = with_variant(file + INDEX, variant)
        if not file.endswith(".json") and index in names:
            notes.append(f"{file} was read; {index} is ignored, as by transformers")
        return file, notes
    wanted = "neither model.safetensors nor pytorch_model.bin, nor an index of one"
    if variant is not None:
        wanted = f"no weights of variant={variant!r}"
    others = [f"variant={other!r}" for other in held if other is not None]
    others += ["weights without a variant"] if variant is not None and None in held else []
    if not held:
        others = sorted(name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in OTHERS))[:3]
    raise ValueError(f"{where} has {wanted}" + (f"; it has {', '.join(others)}" if others else ""))


def variants(names: Collection[str]) -> dict[str | None, str]:
    """File or index that is read for each variant; None is the key of weights without a variant."""
    found = set()
    for name in names:
        match = NAME.fullmatch(name) or INDEX_NAME.fullmatch(name)
        if match is not None and not SHARD.search(name):
            found.add(next((group for group in match.groups() if group), None))
    held: dict[str | None, str] = {}
    for variant in sorted(found, key=str):
        order = [with_variant(single + end, variant) for single in SINGLE for end in ("", INDEX)]
        held[variant] = next(name for name in order if name in names)
    return held


def with_variant(name: str, variant: str | None) -> str:
    """File name of a variant: model.fp16.safetensors, model.safetensors.index.fp16.json."""
    if variant is None:
        return name
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}"


def read_one(file: Path, notes: list[str], allowance: Allowance) -> dict[str, Any]:
    """Tensors of one file; appends notes."""
    if file.suffix == ".safetensors":
        return dict(read_file(file))
    tensors, found = read_tensors(file, allowance)
    notes += found
    return dict(tensors)


def read_shards(folder: Path, index: Path, notes: list[str]) -> Weights:
    """Tensors of all files of an index, in the order of their names, as transformers reads them.

    Tensors that the index does not name are read too; of several with one name, that in the last file is kept.
    """
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no weight_map of tensors to files")
    if not weight_map:
        raise ValueError(f"{index} has an empty weight_map")
    tensors: dict[str, Any] = {}
    places: dict[str, str] = {}
    files: dict[str, Path] = {}
    for name in sorted(set(weight_map.values())):
        files[name] = inside(folder, name, index)
        if not files[name].is_file():  # at once: an index may name any number of them
            raise ValueError(f"{index} names {quoted(name)}, which does not exist in its folder")
    check_distinct(files.values())
    allowance = Allowance(files.values())
    for name, file in files.items():
        held = read_one(file, notes, allowance)
        tensors |= held
        places |= dict.fromkeys(held, name)
    unlisted = sorted(places.keys() - weight_map.keys())
    moved = sorted(key for key in places.keys() & weight_map.keys() if places[key] != weight_map[key])
    if unlisted:
        notes.append(f"{len(unlisted)} tensors in the files are not in {index.name}: {shown(unlisted)}")
    if moved:
        notes.append(f"{len(moved)} tensors were read from another file than {index.name} names: {shown(moved)}")
    return Weights(tensors, index, {key: folder / name for key, name in (weight_map | places).items()}, notes)


def inside(folder: Path, name: Any, where: Path) -> Path:
    """Path of a file in a folder; raises ValueError, beginning with `where`, if the name is none or leads out of it."""
    if not isinstance(name, str) or not name.isprintable():
        raise ValueError(f"{where} names {quoted(name)}, which is not a file in this folder")
    path = Path(name)
    # One file may have one name: with a name like a/./b in each of its many spellings it would be read many times.
    plain = str(path) == name.replace("/", os.sep)
    if not plain or path.is_absolute() or ".." in path.parts or not path.name or len(name) > LONGEST:
        raise ValueError(f"{where} names {quoted(name)}, which is not a file in this folder")
    return folder / path
