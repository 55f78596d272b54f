"""Files of a GPT-NeoX checkpoint: find them, check that they are complete, open them without reading values."""

import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.convert.neox.layout import BLOCK, BLOCK_BUFFERS, EMBEDDING, FINAL_NORM, READOUT, Form
from jaxmodels.io.allowance import Allowance, check_distinct
from jaxmodels.io.bounded import read_text
from jaxmodels.io.formats.torch_files import as_arrays, describe, read_pt, stand_ins
from jaxmodels.process.paths import is_plain
from jaxmodels.process.texts import quoted
from jaxmodels.weights.names import is_floating
from jaxmodels.weights.prefixes import prefix_of, proposal, stripped

LAYER_FILE = re.compile(r"layer_([0-9]+)-model_([0-9]+)-model_states\.pt")
RANK_FILE = re.compile(r"mp_rank_([0-9]+)_model_states\.pt")
LATEST = "latest"  # names the folder of a step
FORMS = (Form("layernorm", True, True), Form("rmsnorm", True, True))
TABLE = (*EMBEDDING, *BLOCK, *FINAL_NORM, *READOUT)
KNOWN = {disk for form in FORMS for name in form.rows(TABLE) for disk in name.disk} | {*BLOCK_BUFFERS}
SEQUENTIAL = re.compile(r"sequential\.(0|[1-9][0-9]{0,8})\.(.+)")  # no other spelling of a number: it is a second name


@dataclasses.dataclass(frozen=True)
class Shard:
    """Tensors of one rank and layer, by their names on disk."""

    file: Path
    tensors: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Shards:
    """All shards of a step, as `layers[XX][rank]`."""

    step: Path
    layout: str
    layers: Mapping[int, list[Shard]]

    @property
    def ranks(self) -> int:
        """Number of model-parallel ranks."""
        return len(next(iter(self.layers.values())))


def find_step(folder: Path) -> Path:
    """Folder of a step: the one that `latest` names, or `folder` itself; raises ValueError if there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    latest = folder / LATEST
    if os.path.lexists(latest) and not latest.is_dir():  # a FIFO of that name is refused as it is read
        try:
            name = read_text(latest, 4096).strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{latest} cannot be read: {error}") from None
        if not is_plain(name) or not (folder / name).is_dir():
            raise ValueError(f"{latest} names {quoted(name)}, which is not a folder in {folder}")
        return folder / name
    if has_shards(folder):
        return folder
    steps = sorted(step.name for step in folder.glob("global_step*") if step.is_dir())
    if len(steps) == 1:
        return folder / steps[0]
    several = f"; choose one of {', '.join(steps)}" if steps else ""
    raise ValueError(f"{folder} holds neither `latest` nor shards (layer_*-model_*-model_states.pt){several}")


def has_shards(folder: Path) -> bool:
    """True if a folder holds shards."""
    return any(LAYER_FILE.fullmatch(file.name) or RANK_FILE.fullmatch(file.name) for file in folder.glob("*.pt"))


def config_files(folder: Path, step: Path) -> list[Path]:
    """YAML files in the `configs` of a step, else of the checkpoint."""
    for configs in (step / "configs", folder / "configs", step.parent / "configs"):
        files = sorted(file for file in configs.glob("*") if file.suffix in (".yml", ".yaml"))
        if files:
            return files
    return []


def open_step(step: Path, strip_prefix: str | None = None) -> Shards:
    """Open every file of a step.

    strip_prefix: words to remove from the names of tensors. Raises ValueError, naming files, if one is missing, damaged
    or not a shard, or if names have a prefix that was not given.
    """
    found = matching(step, LAYER_FILE)
    if found:
        ranks = 1 + max(rank for _, rank in found)
        layers = sorted({layer for layer, _ in found})
        every = ((layer, rank) for layer in layers for rank in range(ranks))  # not listed: a name may have any number
        absent = [layer_file(*one) for one in itertools.islice((one for one in every if one not in found), 5)]
        if absent:
            raise ValueError(f"{step} has files of {ranks} model-parallel ranks, but lacks {', '.join(absent)}")
        for rank in range(ranks):  # the ranks of one layer may be links to one file, as replicas in the Hub's cache
            check_distinct(found[layer, rank] for layer in layers)
        allowance = Allowance(found.values())
        shards = {
            layer: [Shard(found[layer, r], tensors_in(found[layer, r], allowance, strip_prefix)) for r in range(ranks)]
            for layer in layers
        }
        return Shards(step, "layer files", shards)

    files = {rank: file for (rank,), file in matching(step, RANK_FILE).items()}
    lacking = itertools.islice((rank for rank in range(max(files, default=0)) if rank not in files), 5)
    absent = [f"mp_rank_{rank:02}_model_states.pt" for rank in lacking]
    if absent or not files:
        raise ValueError(f"{step} lacks {', '.join(absent) or 'layer_*-model_*-model_states.pt'}")
    check_distinct(files.values())
    allowance = Allowance(files.values())
    by_layer: dict[int, list[Shard]] = {}
    for rank, file in sorted(files.items()):
        split: dict[int, dict[str, Any]] = {}
        for name, tensor in module_in(file, allowance, strip_prefix).items():
            match = SEQUENTIAL.fullmatch(name)
            if match is None and tensor is None:
                continue
            if match is None:
                raise ValueError(f"{file} has {quoted(name)} in its module; expected sequential.XX.NAME")
            split.setdefault(int(match[1]), {})[match[2]] = tensor
        for layer, tensors in split.items():
            by_layer.setdefault(layer, []).append(Shard(file, tensors))
        if any(len(held) != rank + 1 for held in by_layer.values()):
            raise ValueError(f"{file} does not hold the same layers as the ranks before it")
    return Shards(step, "mp_rank files", dict(sorted(by_layer.items())))


def layer_file(layer: int, rank: int) -> str:
    """Name of a layer file."""
    return f"layer_{layer:02}-model_{rank:02}-model_states.pt"


def matching(step: Path, pattern: re.Pattern[str]) -> dict[tuple[int, ...], Path]:
    """Files by the numbers in their names; raises ValueError if two have the same numbers."""
    found: dict[tuple[int, ...], Path] = {}
    for file in sorted(step.iterdir()):
        match = pattern.fullmatch(file.name)
        if match is None:
            continue
        numbers = tuple(map(int, match.groups()))
        if numbers in found:
            raise ValueError(f"{file} and {found[numbers].name} are the same shard")
        found[numbers] = file
    return found


def tensors_in(file: Path, allowance: Allowance, strip_prefix: str | None = None) -> dict[str, Any]:
    """Arrays of a layer file, which is a state_dict."""
    arrays = floating_arrays(file, read_pt(file, stand_ins(), allowance), allowance)
    return renamed(file, arrays, KNOWN.__contains__, strip_prefix)


def module_in(file: Path, allowance: Allowance, strip_prefix: str | None = None) -> dict[str, Any]:
    """Arrays of the state_dict under "module" in an mp_rank file, which also holds NumPy's random state."""
    content = read_pt(file, stand_ins(), allowance)
    if not isinstance(content, Mapping) or "module" not in content:
        raise ValueError(f"{file} has no entry 'module'; it holds {describe(content)}")
    arrays = floating_arrays(file, content["module"], allowance)
    return renamed(file, arrays, lambda name: SEQUENTIAL.fullmatch(name) is not None, strip_prefix)


def renamed(
    file: Path, tensors: dict[str, Any], known: Callable[[str], bool], strip_prefix: str | None
) -> dict[str, Any]:
    """Tensors without a prefix in their names; raises ValueError, naming the file, if they have another one."""
    if strip_prefix is not None and not all(map(known, tensors)):
        tensors, _ = stripped(tensors, strip_prefix, known, str(file))
    prefix = prefix_of(tensors, known)
    if prefix is not None:
        raise ValueError(f"{file}: {proposal(tensors, prefix)}")
    return tensors


def floating_arrays(file: Path, content: Any, allowance: Allowance) -> dict[str, np.ndarray | None]:
    """Arrays of a state_dict, without other entries; None for tensors that are not floating, but for masks."""
    arrays = {name: array for name, array in as_arrays(file, content, allowance).items() if array is not None}
    return {
        name: array if is_floating(array.dtype) or name.endswith(BLOCK_BUFFERS) else None
        for name, array in arrays.items()
    }
