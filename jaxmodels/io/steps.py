"""Checkpoints of a training run on disk: list the steps, check that one is complete, remove one that is ours.

RUN/checkpoints/STEP/model/           folder of a model, for `jaxmodels.load`
RUN/checkpoints/STEP/complete.json    {"format": 2, "step": …, "data": {…}, "files": {path: bytes}}; written last.
                                      "model": content of model/config.json, "config": the run's hyperparameters;
                                      checkpoints of older versions lack both
RUN/checkpoints/STEP/.jaxmodels.json  shows that this program began the step: see `jaxmodels.io.manifest`

A checkpoint without complete.json was interrupted; one with files of another size than it lists is damaged.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from jaxmodels.io import manifest
from jaxmodels.io.atomic import TEMPORARY_FILE, raise_named, temporary_name
from jaxmodels.io.bounded import check_format, read_object, refuse_special
from jaxmodels.io.content import is_written_here, weights_in
from jaxmodels.process.paths import below
from jaxmodels.process.texts import quoted

FORMAT = 2
MARK = "complete.json"
CHECKPOINTS = "checkpoints"
# Folders of a run that are read or written: of metrics and profiles, and of `jaxmodels.convert.companions`.
FOLDERS = (CHECKPOINTS, "tensorboard", "profile", "additional_chat_templates", "configs")
PARTS = ("model", "state", "losses.npy")  # of a step, besides MARK and the manifest
ORBAX_TEMPORARY = ".orbax-checkpoint-tmp"  # follows a folder's name while Orbax writes it
LONGEST = 15  # digits of a step's number


def is_step(folder: Path) -> bool:
    """True if a name in `checkpoints` is a step's, as it is written: 6, not 06, which would be step 6 again."""
    name = folder.name
    return name.isascii() and name.isdecimal() and len(name) <= LONGEST and str(int(name)) == name


def steps(folder: Path) -> list[int]:
    """Steps with a complete.json in a run's `checkpoints` folder, in ascending order."""
    return sorted(int(mark.parent.name) for mark in folder.glob(f"*/{MARK}") if is_step(mark.parent))


def unfinished(folder: Path) -> list[int]:
    """Steps without a complete.json in a run's `checkpoints` folder, in ascending order, which killed runs left."""
    return sorted(int(left.name) for left in folder.glob("*") if is_step(left) and not (left / MARK).exists())


def check_run(run: Path) -> None:
    """Raise ValueError if an entry of a run that is read or written is a symbolic link, or no file or folder.

    Those are all files of the run, and FOLDERS with everything in them; of `checkpoints`, the folders of steps. Links
    to other folders, which nothing here follows, may lie in a run.
    """
    if not run.is_dir():
        return
    for path in sorted(run.iterdir()):
        if path.name in FOLDERS or not path.is_dir():
            manifest.refuse_link(path)
            refuse_special(path)
    for name in FOLDERS:
        if (run / name).is_file():
            raise ValueError(f"{run / name} is a file; expected a folder")
        for path in sorted((run / name).iterdir()) if (run / name).is_dir() else ():
            if is_step(path) or name != CHECKPOINTS:
                for entry in (path, *below(path)):
                    manifest.refuse_link(entry)
                    refuse_special(entry)


def read_mark(folder: Path) -> dict[str, Any]:
    """Content of a step's complete.json; raises ValueError, naming the file, if a field is not what a run writes."""
    file = folder / MARK
    mark = read_object(file)
    check_format(file, mark.get("format"), FORMAT)
    files, step = mark.get("files"), mark.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or str(step) != folder.name:
        raise ValueError(f"{file} has step={quoted(step)}, must be {folder.name}")
    if not isinstance(mark.get("data"), dict):
        raise ValueError(f"{file} has data={quoted(mark.get('data'))}, must be an object")
    if not isinstance(files, dict):
        raise ValueError(f"{file} has files={quoted(files)}, must be an object")
    for name, size in files.items():
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts or str(PurePath(name)) != name:
            raise ValueError(f"{file} lists {quoted(name)}, which is no path in its folder as it is written")
        if isinstance(size, bool) or not isinstance(size, int):
            raise ValueError(f"{file} has {quoted(size)} bytes of {quoted(name)}, must be an integer")
    return mark


def problem(folder: Path) -> str | None:
    """Reason why the checkpoint in a STEP folder is incomplete; None if every file has its listed size."""
    try:
        mark = read_mark(folder)
        for name, size in mark["files"].items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{folder / name} has {found} bytes of {size}"
        if len(weights := weights_in(folder / "model")) > 1:  # others were added
            return f"{folder / 'model'} holds {' and '.join(weights)}; expected one of them"
        described = folder / "model" / "config.json"
        if "model" in mark and (other := difference(read_object(described), mark["model"])) is not None:
            key, now, then = other
            return f"{described} has {key}={quoted(now)}, but {folder / MARK} {quoted(then)}"
    except (OSError, ValueError) as error:
        return f"{folder} is not complete: {error}"
    return None


def difference(found: Mapping[str, Any], wanted: Any) -> tuple[str, Any, Any] | None:
    """First key at which two JSON objects differ, dotted, with its values in both, None if absent; None if they agree.

    Raises ValueError if they are nested too deeply to be compared.
    """
    if not isinstance(wanted, Mapping):
        raise ValueError(f"{quoted(wanted)} must be an object")
    try:
        for key in sorted(found.keys() | wanted.keys()):
            one, other = found.get(key), wanted.get(key)
            if isinstance(one, Mapping) and isinstance(other, Mapping):
                if (inner := difference(one, other)) is not None:
                    return f"{key}.{inner[0]}", *inner[1:]
            elif one != other or isinstance(one, bool) != isinstance(other, bool):
                return key, one, other
    except RecursionError:
        raise ValueError("objects are nested too deeply") from None
    return None


def latest_step(run: Path) -> tuple[Path, dict[int, str]]:
    """STEP folder of a run's last complete checkpoint, and the reasons why later ones were skipped.

    Raises ValueError if the run has no complete checkpoint, or like `check_run`.
    """
    check_run(run)
    skipped: dict[int, str] = {}
    for step in reversed(steps(run / CHECKPOINTS)):
        folder = run / CHECKPOINTS / str(step)
        wrong = problem(folder)
        if wrong is None:
            return folder, skipped
        skipped[step] = wrong
    reasons = f": {'; '.join(skipped.values())}" if skipped else ""
    raise ValueError(f"{run} has no complete checkpoint of a training run{reasons}")


def begin(folder: Path) -> None:
    """Make a STEP folder, with a manifest from its first moment on."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(folder)
    temporary.mkdir()
    try:
        manifest.begin(temporary, folder.name)
        temporary.rename(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise_named(error, temporary, folder)
        raise


def foreign(folder: Path) -> str | None:
    """Reason why a STEP folder must not be removed: nothing shows that this program wrote all of it."""
    if folder.is_symlink() or not folder.is_dir():
        return "it is not a folder"
    found = [name for name, _ in manifest.sizes(folder) if not is_own(folder, name)]
    try:
        if (folder / MARK).exists():
            listed = read_mark(folder)["files"]
            other = [
                name
                for name in found
                if name not in listed or not is_part(name) or not is_written_here(folder, name, complete=True)
            ]
        elif (folder / manifest.NAME).is_file():
            if reason := manifest.unproven(folder):
                return reason
            other = [name for name in found if not is_part(name)]
        else:
            return f"it has neither {MARK} nor {manifest.NAME}" if found else None
    except ValueError as error:
        return str(error)
    return f"{quoted(other[0])} in it was not written by this program" if other else None


def is_part(name: str) -> bool:
    """True for a path in a step's folder that is one of PARTS, or lies in one."""
    return PurePath(name).parts[0].partition(ORBAX_TEMPORARY)[0] in PARTS


def is_own(folder: Path, name: str) -> bool:
    """True for a step's complete.json and manifest, also by temporary names, and for folders without files."""
    path = folder / name
    mark = name == MARK or (TEMPORARY_FILE.fullmatch(name) is not None and name.startswith(f".{MARK}."))
    return mark or manifest.NEW.fullmatch(name) is not None or (path.is_dir() and not path.is_symlink())


def remove(folder: Path) -> None:
    """Remove a STEP folder; raises ValueError, with the reason, if it is `foreign`.

    Whenever the process is killed, what is left is not a checkpoint, and is removed by the next run.
    """
    clear(folder)
    manifest.remove(folder)


def clear(folder: Path) -> None:
    """Remove what a STEP folder holds but its manifest, which claims what Orbax's threads may still write there.

    Raises ValueError like `remove`.
    """
    if reason := foreign(folder):
        raise ValueError(f"{folder} is not removed: {reason}; move or delete it yourself")
    manifest.begin(folder)
    (folder / MARK).unlink(missing_ok=True)
    manifest.clear(folder)
