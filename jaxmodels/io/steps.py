"""Checkpoints of a training run on disk: list the steps, check that one is complete.

RUN/checkpoints/STEP/model/           folder of a model, for `jaxmodels.load`
RUN/checkpoints/STEP/complete.json    {"format": 2, "step": …, "data": {…}, "files": {path: bytes}}; written last

A checkpoint without complete.json was interrupted; one with files of another size than it lists is damaged.
"""

from pathlib import Path

from jaxmodels.io.bounded import read_object

FORMAT = 2
MARK = "complete.json"


def steps(folder: Path) -> list[int]:
    """Steps with a complete.json in a run's `checkpoints` folder, in ascending order."""
    return sorted(int(mark.parent.name) for mark in folder.glob(f"*/{MARK}") if mark.parent.name.isdecimal())


def problem(folder: Path) -> str | None:
    """Reason why the checkpoint in a STEP folder is incomplete; None if every file has its listed size."""
    try:
        mark = read_object(folder / MARK)
        if mark["format"] != FORMAT:
            return f"{folder / MARK} has format {mark['format']}, this version reads {FORMAT}"
        for name, size in mark["files"].items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{folder / name} has {found} bytes of {size}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder} is not complete: {error}"
    return None


def latest_step(run: Path) -> tuple[Path, dict[int, str]]:
    """STEP folder of a run's last complete checkpoint, and the reasons why later ones were skipped.

    Raises ValueError if the run has no complete checkpoint.
    """
    skipped: dict[int, str] = {}
    for step in reversed(steps(run / "checkpoints")):
        folder = run / "checkpoints" / str(step)
        wrong = problem(folder)
        if wrong is None:
            return folder, skipped
        skipped[step] = wrong
    reasons = f": {'; '.join(skipped.values())}" if skipped else ""
    raise ValueError(f"{run} has no complete checkpoint of a training run{reasons}")
