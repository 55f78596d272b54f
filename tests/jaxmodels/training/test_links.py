"""Symbolic links in runs: every command refuses them before it reads or writes anything."""

import json
import os
from pathlib import Path

import pytest

import jaxmodels
from jaxmodels.convert.command import main as convert
from jaxmodels.convert.companions import Companions
from jaxmodels.convert.open import open_source
from jaxmodels.io.steps import check_run
from jaxmodels.training.commands import evaluate, plot, sample
from jaxmodels.training.runs.folder import write_about
from jaxmodels.training.script import main, parse
from jaxmodels.training.trainer import Trainer
from tests.jaxmodels.io.test_steps import complete
from tests.train_common import TEXT, TINY
from train.rope import Rope

NAMES = ["checkpoints", "checkpoints/7", "checkpoints/7/losses.npy", "config.json", "vocabulary.json", ".lock"]
NAMES += ["metrics.jsonl", "tensorboard", "additional_chat_templates", "additional_chat_templates/a.jinja", "configs"]


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
    link.parent.mkdir(exist_ok=True)
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


@pytest.mark.parametrize("name", ["tokenizer.json", "additional_chat_templates/a.jinja", "checkpoints/7/losses.npy"])
def test_a_fifo_in_a_run_is_refused(name, tmp_path):
    complete(tmp_path / "run")
    fifo = tmp_path / "run" / name
    fifo.parent.mkdir(exist_ok=True)
    fifo.unlink(missing_ok=True)
    os.mkfifo(fifo)
    with pytest.raises(ValueError, match=f"{fifo} is a FIFO"):
        check_run(tmp_path / "run")


def test_a_link_to_a_folder_that_nothing_opens_may_lie_in_a_run(tmp_path):
    complete(tmp_path / "run")
    (tmp_path / "notes").mkdir()
    (tmp_path / "run" / "notes").symlink_to(tmp_path / "notes")
    check_run(tmp_path / "run")


def test_companions_are_written_through_no_link(tmp_path):
    source, target, mine = tmp_path / "source", tmp_path / "target", tmp_path / "mine"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "additional_chat_templates" / "a.jinja").write_text("new")
    (source / "tokenizer.json").write_text("{}")
    target.mkdir()
    mine.write_text("mine")
    os.link(mine, target / "tokenizer.json")
    (target / "additional_chat_templates").mkdir()
    (target / "additional_chat_templates" / "a.jinja").symlink_to(mine)
    companions = Companions.of(source)
    companions.write(target)
    assert mine.read_text() == "mine"
    assert Companions.of(target).files.keys() == companions.files.keys()
    assert {file.read_text() for file in Companions.of(target).files.values()} == {"new", "{}"}
    (target / "tokenizer.json").unlink()
    os.mkfifo(target / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer\.json is a FIFO"):
        companions.write(target)
    (tmp_path / "other").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "other" / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="additional_chat_templates is a symbolic link"):
        companions.write(tmp_path / "other")
    assert not any((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("inside", [True, False])
def test_a_run_does_not_begin_beside_companions_of_another_checkpoint(tmp_path, inside):
    source, run = tmp_path / "source", tmp_path / "run"
    (run / "additional_chat_templates").mkdir(parents=True)
    source.mkdir()
    tokenizer = {"tokenizer": "{}"} if inside else {"characters": "ab"}  # written as tokenizer.json, or not at all
    (source / "vocabulary.json").write_text(json.dumps(tokenizer))
    (source / "chat_template.jinja").write_text("new")
    companions = Companions.of(source)
    for name in ("vocabulary.json", "chat_template.jinja"):
        (run / name).write_text("{}")
    companions.refuse_others(run)
    (run / "tokenizer.json").write_text("{}")
    if inside:
        companions.refuse_others(run)
        companions.write(run)
        companions.refuse_others(run)
    else:
        with pytest.raises(ValueError, match=rf"^{run} has 'tokenizer\.json' .*--out"):
            companions.refuse_others(run)
    for name in ("generation_config.json", "additional_chat_templates/a.jinja"):
        (run / name).write_text("{}")
        with pytest.raises(ValueError, match=rf"^{run} has .*'{name}'"):
            companions.refuse_others(run)
        (run / name).unlink()
    with pytest.raises(ValueError, match=rf"^{run} has 'chat_template\.jinja'"):
        Companions().refuse_others(run)


def test_the_lock_of_a_run_is_no_file_of_others(tmp_path, flags):
    mine, run = tmp_path / "mine", tmp_path / "run"
    mine.write_text("mine")
    run.mkdir()
    os.link(mine, run / ".lock")
    with pytest.raises(ValueError, match=r"\.lock is a file with 2 names"):
        main(Rope, "python -m train.rope", [*flags, "--out", str(run)])
    assert mine.read_text() == "mine"
