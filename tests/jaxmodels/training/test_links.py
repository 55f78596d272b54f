"""Symbolic links in runs: every command refuses them before it reads or writes anything."""

from pathlib import Path

import pytest

import jaxmodels
from jaxmodels.convert.command import main as convert
from jaxmodels.convert.open import open_source
from jaxmodels.training.commands import evaluate, plot, sample
from jaxmodels.training.run import write_about
from jaxmodels.training.script import main, parse
from jaxmodels.training.trainer import Trainer
from tests.jaxmodels.io.test_steps import complete
from tests.train_common import TEXT, TINY
from train.rope import Rope

NAMES = ["checkpoints", "checkpoints/7", "checkpoints/7/losses.npy", "config.json", "vocabulary.json", ".lock"]
NAMES += ["metrics.jsonl", "tensorboard"]


@pytest.fixture
def flags(tmp_path):
    (tmp_path / "sea.txt").write_text(TEXT)
    return [*TINY, "--text", str(tmp_path / "sea.txt"), "--steps", "9"]


@pytest.fixture(params=NAMES)
def link(request, tmp_path, flags) -> Path:
    """A link in a run, to what it had there before, or to a folder of others."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    experiment, _ = parse(Rope, "python -m train.rope", flags)
    complete(run)
    write_about(run, experiment, "0" * 64, {})
    for name in ("vocabulary.json", "metrics.jsonl", ".lock"):
        (run / name).write_text("{}")
    link = run / request.param
    if link.exists():
        link.rename(elsewhere)
    else:
        (elsewhere / "2019").mkdir(parents=True)
        (elsewhere / "2019" / "photo.jpg").write_text("mine")
    link.symlink_to(elsewhere)
    return link


def state(folder: Path) -> dict[Path, object]:
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


def test_every_command_refuses_a_link(link, tmp_path, flags, capsys):
    run, before = tmp_path / "run", state(tmp_path)
    commands = [
        lambda: sample.main([str(run)]),
        lambda: evaluate.main([str(run)]),
        lambda: plot.main([str(run), "--out", str(tmp_path / "curves.png")]),
        lambda: convert(["inspect", str(run)]),
        lambda: convert(["neox", str(run), str(tmp_path / "out"), "--to", "hf"]),
    ]
    for command in commands:
        assert command() == 2
        assert f"{link} is a symbolic link" in capsys.readouterr().err
    for arguments in (["--resume", str(run)], [*flags, "--out", str(run)]):
        with pytest.raises(ValueError, match=f"{link} is a symbolic link"):
            main(Rope, "python -m train.rope", arguments)
    experiment, command = parse(Rope, "python -m train.rope", flags)
    for refused in (
        lambda: jaxmodels.load(run),
        lambda: open_source(run / "checkpoints" / "7"),
        lambda: Trainer(experiment, run, command.options),
    ):
        with pytest.raises(ValueError, match=f"{link} is a symbolic link"):
            refused()
    assert state(tmp_path) == before
