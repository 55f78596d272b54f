"""Recognize what a folder holds.

model   written by jaxmodels.save or a conversion: config.json with "format" and "model"; params/ or params*.safetensors
run     a training run: config.json with "script", checkpoints/STEP/model; also a STEP of it
neox    GPT-NeoX's shards: `latest` and global_step*/, or the folder of a step
hf      Hugging Face: config.json with "model_type", model*.safetensors or pytorch_model*.bin; also the folder of a
        repository in the Hub's cache (models--ORG--NAME/snapshots/COMMIT)
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jaxmodels.convert.companions import FILES
from jaxmodels.convert.kinds.unusable import HF_WEIGHTS, check_hf, check_pointers, check_step, explain, explain_file
from jaxmodels.io.bounded import read_object, read_text
from jaxmodels.io.steps import CHECKPOINTS, MARK, check_run

Kind = Literal["model", "run", "neox", "hf"]
NAMES: dict[Kind, str] = {
    "model": "model of this project",
    "run": "training run",
    "neox": "GPT-NeoX shards",
    "hf": "Hugging Face",
}
SHARDS = ("latest", "global_step*", "*model_states.pt", "*optim_states.pt")


CHILD_BYTES = 2**17  # of a subfolder's config.json: hundreds of larger ones would take minutes


@dataclasses.dataclass(frozen=True)
class Place:
    """A recognized checkpoint. folder: of a run, the run itself; step: folder of one step of a run, if it was named.

    beside: folders with the companions of the weights, the first one first.
    """

    kind: Kind
    folder: Path
    step: Path | None = None
    beside: tuple[Path, ...] = ()


def find(folder: Path) -> Place:
    """Recognize a folder; raises ValueError, with what it holds instead, if it holds no checkpoint to load."""
    if not folder.is_dir():
        raise ValueError(explain_file(folder))
    place = recognized(folder)
    if place is None:
        raise ValueError(explain(folder, children(folder)))
    return place


def recognized(folder: Path) -> Place | None:
    """Place of a folder that can be loaded; None if nothing says that it can.

    Raises ValueError if the folder is of a known kind and unusable.
    """
    published = matches(folder, HF_WEIGHTS)  # no run has such weights; those of the Hub's cache are links
    if not published and ((folder / CHECKPOINTS).is_dir() or (folder / CHECKPOINTS).is_symlink()):
        check_run(folder)
    check_pointers(folder, ("config.json", "latest", *FILES))
    file = folder / "config.json"
    config = read_object(file) if file.is_file() else {}
    named = config.get("transformers_weights")  # file of weights with another name
    has_weights = published or (isinstance(named, str) and (folder / named).is_file())
    if "model_type" in config and has_weights:
        check_hf(folder, config)
        return Place("hf", folder, beside=(folder,))
    if "script" in config or (folder / CHECKPOINTS).is_dir():
        check_run(folder)
        return Place("run", folder, beside=(folder,))
    if {"format", "model"} <= config.keys():
        run = run_above(folder)
        if run is not None:
            check_run(run)
        return Place("model", folder, beside=(folder,) if run is None else (folder, run))
    if (folder / MARK).is_file() and (folder / "model" / "config.json").is_file():
        run = run_above(folder / "model") or folder
        check_run(run)
        return Place("run", run, step=folder, beside=(run,))
    if snapshot := hub_snapshot(folder):
        return recognized(snapshot)
    if matches(folder, SHARDS):
        step = check_step(folder)
        return Place("neox", folder, beside=(folder, *places_of_step(folder, step)))
    if "model_type" in config:
        check_hf(folder, config)
    return None


def run_above(model: Path) -> Path | None:
    """Folder of the run whose checkpoint RUN/checkpoints/STEP/model is; None if it is not part of a run."""
    model = model.absolute()
    step = model.parent
    return step.parents[1] if (step / MARK).is_file() and step.parent.name == CHECKPOINTS else None


def places_of_step(folder: Path, step: Path) -> tuple[Path, ...]:
    """Further folders with companions of GPT-NeoX's shards: the step, or the checkpoint around it."""
    if step != folder:
        return (step,)
    above = folder.absolute().parent
    return (above,) if (above / "latest").is_file() else ()


def hub_snapshot(folder: Path) -> Path | None:
    """Snapshot in the folder of a repository in the Hub's cache: that of `main`, or the only one; None if it is none.

    Raises ValueError if there are several and none is `main`, or none at all.
    """
    if folder.name == "snapshots" and folder.absolute().parent.name.startswith("models--"):
        folder = folder.absolute().parent
    if not (folder / "snapshots").is_dir() or not ((folder / "blobs").is_dir() or folder.name.startswith("models--")):
        return None
    found = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    if os.path.lexists(main):
        named = folder / "snapshots" / read_text(main, 4096).strip()
        if named in found:
            return named
    if len(found) != 1:
        names = f"; choose one of {', '.join(str(path) for path in found)}" if found else "; download it again"
        raise ValueError(f"{folder} is a repository in the Hub's cache with {len(found)} snapshots{names}")
    return found[0]


def children(folder: Path) -> list[tuple[str, str]]:
    """Names and kinds of the subfolders that can be loaded, at most ten."""
    found = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir())[:200]:
        try:
            file = path / "config.json"
            if file.is_file() and file.stat().st_size > CHILD_BYTES:
                continue
            place = recognized(path)
        except (ValueError, OSError):
            continue
        if place is not None:
            found.append((path.name, NAMES[place.kind]))
    return found[:10]


def matches(folder: Path, patterns: Sequence[str]) -> bool:
    """True if a folder holds something that matches one of the patterns."""
    return any(any(folder.glob(pattern)) for pattern in patterns)
