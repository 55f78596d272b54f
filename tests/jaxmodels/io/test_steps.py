"""Steps of a training run on disk: links are refused, only what this program wrote is removed."""

import errno
import json
import os
import re

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from jaxmodels.io import manifest, steps
from jaxmodels.io.clean import main as clean
from tests.jaxmodels.io.test_atomic import aged


def complete(run, step: int = 7):
    """A step with three files and its complete.json."""
    folder = run / "checkpoints" / str(step)
    steps.begin(folder)
    files = {"model/config.json": b'{"a"}', "model/params/orbax.checkpoint": b"", "losses.npy": b"\x93NUMP"}
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    about = {"format": 2, "step": step, "data": {}, "files": {name: len(files[name]) for name in files}}
    (folder / "complete.json").write_text(json.dumps(about))
    return folder


def test_a_complete_step_is_found_and_removed(tmp_path):
    folder = complete(tmp_path)
    assert steps.problem(folder) is None
    assert steps.latest_step(tmp_path) == (folder, {})
    steps.remove(folder)
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("name", ["params.safetensors", "params.safetensors.index.json"])
def test_weights_that_were_added_to_a_step_are_noticed(name, tmp_path):
    folder = complete(tmp_path)
    (folder / "model" / name).write_bytes(b"")
    assert str(steps.problem(folder)).endswith(f"model holds params and {name}; expected one of them")


OTHERS = ["notes.txt", "model/notes.txt", "model/extra/notes.txt", ".complete.json.diary", "model/complete.json"]


@pytest.mark.parametrize("name", OTHERS)
def test_a_step_that_holds_a_file_of_others_is_kept(name, tmp_path):
    folder = complete(tmp_path)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=f"{folder} is not removed: '{name}'"):
        steps.remove(folder)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("name", ["diary.txt", "model/diary.txt", "losses.npy", "vocab.txt", "lock"])
def test_a_list_of_files_proves_nothing(name, tmp_path):
    folder = tmp_path / "7"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("mine")
    about = {"format": 2, "step": 7, "data": {}, "files": {name: 4}}
    (folder / "complete.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=f"{folder} is not removed: '{name}'"):
        steps.remove(folder)
    assert (folder / name).read_text() == "mine"


@pytest.mark.parametrize(
    "name",
    [
        *("photo.jpg", "photos/1.jpg", "models/1.jpg", "model/1.jpg", "state/notes", "losses.npy"),
        *(".complete.json.diary", "model/complete.json"),
    ],
)
def test_an_unfinished_step_that_holds_a_file_of_others_is_kept(name, tmp_path):
    for begun in (True, False):
        folder = tmp_path / str(begun) / "2019"
        steps.begin(folder) if begun else folder.mkdir(parents=True)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
        with pytest.raises(ValueError, match=f"{folder} is not removed"):
            steps.remove(folder)
        assert (folder / name).read_text() == "mine"


def test_every_file_of_orbax_in_an_unfinished_step_is_this_program_s(tmp_path):
    folder = tmp_path / "checkpoints" / "3"
    steps.begin(folder)
    rng = np.random.default_rng(3)
    arrays = {f"a{i}": rng.normal(size=(37, 41)).astype("f4") for i in range(5)}
    ocp.save(folder / "state", arrays)
    assert len(list(folder.glob("state/state/**/d/*"))) > 1
    assert steps.foreign(folder) is None
    steps.remove(folder)
    assert not folder.exists()


def test_an_unfinished_step_of_this_program_s_is_removed(tmp_path):
    folder = tmp_path / "7"
    steps.begin(folder)
    block = f"state/d/{'0' * 32}"
    for name in (f"model/params/{block}", f"state.orbax-checkpoint-tmp/{block}", ".complete.json.0123abcd.jaxmodels"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{" if "json" in name else b"\x0c\xdb:*q")
    steps.remove(folder)
    (tmp_path / "8").mkdir()  # killed between two calls
    steps.remove(tmp_path / "8")
    assert list(tmp_path.iterdir()) == []


def test_arrays_of_an_unfinished_step_are_removed(tmp_path):
    folder = tmp_path / "7"
    steps.begin(folder)
    arrays = {"kernel": np.random.default_rng(0).standard_normal((61, 67)), "count": np.array(3, np.int32)}
    for name in ("model/params", "state"):
        ocp.save(folder / name, arrays)
    for file in (folder / "state").rglob("*/d/*"):
        file.write_bytes(file.read_bytes()[:1000])  # as a kill or a full disk leaves it
    written = (folder / manifest.NAME).stat().st_mtime_ns
    steps.clear(folder)
    assert [file.name for file in folder.iterdir()] == [manifest.NAME]
    (folder / "state.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (folder / "state.orbax-checkpoint-tmp" / "state" / "_sharding").write_text("{")  # by a thread that goes on
    steps.clear(folder)
    assert (folder / manifest.NAME).stat().st_mtime_ns == written  # a full disk could not hold it a second time
    steps.remove(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_cannot_be_begun_leaves_nothing(tmp_path, monkeypatch):
    def full(*names):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(manifest, "begin", full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        steps.begin(tmp_path / "7")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"step": 8}, "step=8.*7"),
        ({"step": True}, "step=True"),
        ({"step": 10**30}, "step=1"),
        ({"step": 10**400}, "401 digits"),
        ({"data": []}, r"data=\[\]"),
        ({"files": ["a"]}, "files="),
        ({"files": {"../../secret": 5}}, "secret"),
        ({"files": {"/nowhere/secret": 5}}, "secret"),
        ({"files": {"losses.npy": None}}, "None"),
        ({"files": {"losses.npy": 6}}, "5 bytes of 6"),
        ({"format": 3}, "format 3"),
    ],
)
def test_another_content_of_complete_json_is_no_checkpoint(change, match, tmp_path):
    folder = complete(tmp_path)
    mark = json.loads((folder / "complete.json").read_text())
    (folder / "complete.json").write_text(json.dumps(mark | change))
    assert re.search(match, steps.problem(folder) or "")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        steps.latest_step(tmp_path)


def test_absurd_numbers_of_steps_are_no_steps(tmp_path):
    for name in ("9" * 400, "²", "-1", "1.5", "7.damaged", "07", "007"):
        (tmp_path / "checkpoints" / name[:200]).mkdir(parents=True)
        (tmp_path / "checkpoints" / name[:200] / "complete.json").write_text("{}")
    assert steps.steps(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", "profile"])
def test_a_file_in_place_of_a_folder_is_refused(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"{tmp_path / name} is a file"):
        steps.check_run(tmp_path)


LINKS = [
    "checkpoints",
    "checkpoints/7",
    "checkpoints/8",
    "checkpoints/7/model",
    "checkpoints/7/model/config.json",
    "config.json",
    "vocabulary.json",
    ".lock",
    "metrics.jsonl",
    ".config.json.0123abcd",
    "tokenizer.json",
    "tensorboard",
    "tensorboard/events.out.tfevents.1",
    "profile",
]


@pytest.mark.parametrize("kind", ["elsewhere", "nowhere"])
@pytest.mark.parametrize("name", LINKS)
def test_a_link_in_a_run_is_refused(name, kind, tmp_path):
    run = tmp_path / "run"
    complete(run)
    steps.check_run(run)
    (run / "tensorboard").mkdir()
    link = run / name
    if link.exists():
        link.rename(tmp_path / "elsewhere")
    link.symlink_to(tmp_path / kind)
    with pytest.raises(ValueError, match=f"{link} is a symbolic link"):
        steps.check_run(run)
    with pytest.raises(ValueError, match=f"{link} is a symbolic link"):
        steps.latest_step(run)


def test_a_link_to_a_folder_that_no_program_opens_may_lie_in_a_run(tmp_path):
    folder = complete(tmp_path / "run")
    (tmp_path / "run" / "best").symlink_to(folder)
    (tmp_path / "run" / "checkpoints" / "best").symlink_to("7")
    assert steps.latest_step(tmp_path / "run")[0] == folder
    (tmp_path / "alias").symlink_to(tmp_path / "run")  # the user's own name for the run
    assert steps.latest_step(tmp_path / "alias")[0].name == "7"


def test_clean_removes_unfinished_steps_of_killed_runs_alone(tmp_path, capsys):
    folder = complete(tmp_path / "run")
    for step in (8, 9):
        steps.begin(tmp_path / "run" / "checkpoints" / str(step))
    (tmp_path / "run" / "checkpoints" / "9" / "photo.jpg").write_text("mine")
    (tmp_path / "run" / "checkpoints" / "10").mkdir()
    begun = tmp_path / "run" / "checkpoints" / ".11.0123abcd"
    begun.mkdir()
    (begun / manifest.NAME).write_text('{\n "form')  # killed as it wrote the manifest
    aged(tmp_path)
    assert clean([str(tmp_path), "--delete"]) == 0
    assert "removed 2," in capsys.readouterr().out
    assert sorted(path.name for path in folder.parent.iterdir()) == ["10", "7", "9"]


@pytest.mark.parametrize("name", ["./losses.npy", "model//config.json", "losses.npy/", "model/./config.json"])
def test_a_file_of_a_step_is_listed_by_one_name(name, tmp_path):
    """A million spellings of one name would take minutes."""
    folder = complete(tmp_path)
    about = json.loads((folder / "complete.json").read_text())
    about["files"][name] = len(b"\x93NUMP")
    (folder / "complete.json").write_text(json.dumps(about))
    assert f"lists {name!r}, which is no path" in str(steps.problem(folder))
