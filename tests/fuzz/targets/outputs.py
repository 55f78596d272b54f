"""Files that commands write: what lies at their places may be a link, a FIFO, a folder, or anything else."""

from pathlib import Path

import numpy as np

from tests.fuzz.targets.kind import Target

NAMES = ("weights.pt", "vocabulary.json", "report.txt", "metrics.jsonl")


def make_outputs(folder: Path) -> None:
    for name in NAMES:
        (folder / f"out-{name}").write_text("" if name.endswith(".jsonl") else "of an earlier command\n")
    write_fixture(folder / "out-fixture")


def write_fixture(stem: Path) -> None:
    """A recording, as far as its writer looks: it replaces no other files."""
    from parity.golden.fixture import FIELDS, write

    write(stem, {name: np.ones(3, np.float32) for name in ("inputs/x", "output/output")}, dict.fromkeys(FIELDS))


def write_outputs(folder: Path) -> None:
    """Every writer of single files; each error must name a file, and nothing else may change."""
    from jaxmodels.io.atomic import atomic_file
    from jaxmodels.io.formats.torch_files import write_state_dict
    from jaxmodels.text import CharVocabulary
    from parity.mutation.state import State

    def report() -> None:
        with atomic_file(folder / "out-report.txt") as new:
            new.write_text("text\n")

    def state() -> None:
        with State.opened(folder / "out-metrics.jsonl") as opened:
            opened.add("one", None)

    writers = (
        lambda: write_state_dict(folder / "out-weights.pt", {"a": np.ones(3, np.float32)}),
        lambda: CharVocabulary("abc").save(folder / "out-vocabulary.json"),
        lambda: write_fixture(folder / "out-fixture"),
        report,
        state,
    )
    refused: list[Exception] = []
    for one in writers:
        try:
            one()
        except (ValueError, OSError) as error:
            refused.append(error)
    if refused:
        raise refused[0]


def make_folder(folder: Path) -> None:
    """A folder that an earlier command wrote."""
    from jaxmodels.io.atomic import atomic_folder

    with atomic_folder(folder / "out") as new:
        for name in ("config.json", "part/params.safetensors"):
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_text("{}")


def write_folder(folder: Path) -> None:
    from jaxmodels.io.atomic import atomic_folder

    with atomic_folder(folder / "out", overwrite=True) as new:
        (new / "config.json").write_text("{}")


TARGETS = (
    Target("outputs", make_outputs, write_outputs, "out-*", changes=True),
    Target("output folder", make_folder, write_folder, changes=True),
)
