"""Atomic files and folders; only what this program wrote is replaced. Models are saved in `test_models.py`."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxmodels.io import atomic, manifest
from jaxmodels.io.atomic import atomic_file, atomic_folder, check_target
from jaxmodels.io.clean import main as clean


def write(folder: Path, **files: str) -> Path:
    """A folder of this program's."""
    with atomic_folder(folder, overwrite=True) as new:
        for name, text in files.items():
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_text(text)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): file.read_text()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != manifest.NAME
    }


def test_a_file_is_complete_whichever_process_writes_it(tmp_path):
    file = tmp_path / "about.json"
    with atomic_file(file) as one, atomic_file(file) as other:
        one.write_text("one")
        other.write_text("other")
    assert file.read_text() == "one"  # the last that was complete

    def interrupted():
        with atomic_file(file) as half:
            half.write_text("ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["about.json"]
    assert file.read_text() == "one"


def test_a_link_is_replaced_and_its_target_stays(tmp_path):
    (tmp_path / "mine").write_text("mine")
    link = tmp_path / "report.html"
    link.symlink_to("mine")
    with atomic_file(link) as new:
        new.write_text("report")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not link.is_symlink()


def test_a_disk_error_names_the_file(tmp_path):
    def full():
        with atomic_file(tmp_path / "tokens.npy") as new:
            new.write_text("ha")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device.*tokens\.npy"):
        full()
    assert list(tmp_path.iterdir()) == []


FOREIGN = {
    "a file beside": lambda folder: (folder / "notes.txt").write_text("mine"),
    "a file inside": lambda folder: (folder / "params" / "notes.txt").write_text("mine"),
    "a changed file": lambda folder: (folder / "config.json").write_text("changed"),
    "an empty folder": lambda folder: (folder / "photos").mkdir(),
    "a link to a file": lambda folder: (folder / "link").symlink_to("/etc/passwd"),
    "a link to a folder": lambda folder: (folder / "link").symlink_to("/etc"),
    "a link for a file": lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").symlink_to("/x")),
    "no manifest": lambda folder: (folder / manifest.NAME).unlink(),
    "another manifest": lambda folder: (folder / manifest.NAME).write_text('{"format": 2}'),
    "no list": lambda folder: (folder / manifest.NAME).write_text('{"format": 1, "complete": true, "files": 3}'),
    "an unfinished manifest": lambda folder: manifest.begin(folder),
    "no JSON": lambda folder: (folder / manifest.NAME).write_text("{"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_folder_with_anything_foreign_is_never_replaced(what, tmp_path):
    folder = write(tmp_path / "model", **{"config.json": "one", "params/a": "1"})
    FOREIGN[what](folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=f"{folder} is not overwritten: "):
        write(folder, **{"config.json": "two"})
    assert sorted(folder.rglob("*")) == before
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("name", ["config.json", "latest", "model.safetensors"])
def test_a_file_of_a_checkpoint_s_name_is_no_proof(name, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{tmp_path} is not overwritten"):
        check_target(tmp_path, overwrite=True)


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_of_this_program_s_is_replaced(exchanges, tmp_path, monkeypatch):
    if not exchanges:
        monkeypatch.setattr(atomic, "exchange", lambda a, b: False)
    folder = write(tmp_path / "model", **{"config.json": "one", "params/a": "1"})
    (folder / "params" / "a").unlink()  # less than the manifest lists is no one else's
    write(folder, **{"config.json": "two", "params/b": "2"})
    assert contents(folder) == {"config.json": "two", "params/b": "2"}
    assert list(tmp_path.iterdir()) == [folder]


def test_names_are_exchanged_in_one_step(tmp_path, monkeypatch):
    """No moment in which a reader finds no folder: the kernel exchanges the names."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    if not atomic.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange names")
    folder = write(tmp_path / "model", file="one")
    monkeypatch.setattr(Path, "rename", lambda *names: pytest.fail("renamed in two steps"))
    write(folder, file="two")
    assert contents(folder) == {"file": "two"}


KILLED = """
import os, signal
from pathlib import Path
from jaxmodels.io import atomic
rename = Path.rename
def killed(path, other):
    rename(path, other)
    if str(other).endswith(".old"):
        os.kill(os.getpid(), signal.SIGKILL)
Path.rename = killed
atomic.exchange = lambda a, b: False
with atomic.atomic_folder("model", overwrite=True) as new:
    (new / "config.json").write_text("{ }")
"""


def test_a_kill_between_two_renames_is_undone_at_the_next_start(tmp_path, capsys):
    folder = write(tmp_path / "model", **{"config.json": "{}"})
    env = os.environ | {"PYTHONPATH": str(Path(atomic.__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, env=env, check=False)
    assert run.returncode == -signal.SIGKILL
    assert not folder.exists()
    atomic.recover(folder)
    assert contents(folder) == {"config.json": "{}"}
    assert "recovered" in capsys.readouterr().err
    aged(tmp_path)
    assert clean([str(tmp_path), "--delete"]) == 0
    assert list(tmp_path.iterdir()) == [folder]


def aged(folder: Path) -> None:
    """Set the times of everything in a folder two hours back."""
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 7200,) * 2, follow_symlinks=False)


def test_clean_lists_and_then_removes_the_leftovers_alone(tmp_path, capsys):
    kept = ["model.safetensors", ".gitignore", ".config.json.12345678x", "a.12345678", ".cache.0123abcd/photo.jpg"]
    kept += [".backup.20241126", ".jaxmodels", ".env.0123abcd.jaxmodels.txt", ".notes.20240131.jaxmodels"]
    kept += [".model.20240131/.jaxmodels.json", ".model.20240131/config.json"]  # a finished folder, renamed
    for name in kept:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / ".model.20240131" / ".jaxmodels.json").unlink()
    manifest.finish(tmp_path / ".model.20240131")
    (tmp_path / ".link.0123abcd").symlink_to(tmp_path / "model.safetensors")
    left = tmp_path / "inside" / ".model.89abcdef"
    left.mkdir(parents=True)
    manifest.begin(left)
    (left / "config.json").write_text('{"ha')
    (tmp_path / "inside" / ".about.json.0000000a.jaxmodels").write_text("ha")
    aged(tmp_path)
    assert clean([str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert ".model.89abcdef" in listed
    assert ".about.json.0000000a.jaxmodels" in listed
    assert "2 to remove" in listed
    assert left.exists()
    assert clean([str(tmp_path), "--delete"]) == 0
    assert list((tmp_path / "inside").iterdir()) == []
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()) == sorted(
        [*kept, ".link.0123abcd"]
    )


# What somebody has put into a folder of the user's, or the user into one of theirs, where a manifest claims everything.
CLAIMED = {
    "a file": {"thesis.tex": "mine"},
    "a file of a known name": {"config.json": "mine", "tokenizer.json": "[mine]"},
    "a file in a known folder": {"params/thesis.tex": "mine", "params/state/d/thesis.tex": "mine"},
    "another content": {"model.safetensors": "mine, and longer than a header's length"},
    "a number in other digits": {"global_step0/layer_\u0660\u0660-model_00-model_states.pt": "PK\x03\x04 mine"},
    "another archive": {"global_step0/layer_00-model_00-model_states.pt": "mine"},
}


@pytest.mark.parametrize("what", CLAIMED)
@pytest.mark.parametrize("name", [".model.0a1b2c3d", ".model.20241126.old"])
def test_an_unfinished_manifest_claims_no_file_of_others(what, name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    manifest.begin(folder)
    for file, text in CLAIMED[what].items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    aged(tmp_path)
    assert clean([str(tmp_path), "--delete"]) == 0
    assert contents(folder) == CLAIMED[what]


def test_an_unfinished_manifest_belongs_to_a_folder_of_its_name(tmp_path):
    for name in (".model.0a1b2c3d", ".photos.20241126"):
        (tmp_path / name).mkdir()
        manifest.begin(tmp_path / name, ".model.0a1b2c3d")
        (tmp_path / name / "config.json").write_text("{}")
    aged(tmp_path)
    assert clean([str(tmp_path), "--delete"]) == 0
    assert contents(tmp_path) == {".photos.20241126/config.json": "{}"}


@pytest.mark.parametrize("name", ["two\nlines", os.fsdecode(b"not-\xff-utf-8"), "x" * 230])
def test_what_a_kill_leaves_of_a_target_of_any_name_is_removed(name, tmp_path):
    folder = tmp_path / f".{name}.0a1b2c3d"
    folder.mkdir()
    manifest.begin(folder)
    (folder / "config.json").write_text("{}")
    (folder / f".{manifest.NAME}.a1b2c3d4.jaxmodels").write_text('{"form')  # killed as the manifest was finished
    (tmp_path / f".{name}.0a1b2c3d.jaxmodels").write_text("half")
    aged(tmp_path)
    assert clean([str(tmp_path), "--delete"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_is_replaced_at_once(tmp_path, monkeypatch):
    manifest.begin(tmp_path, "model")
    before = (tmp_path / manifest.NAME).read_text()

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        manifest.finish(tmp_path)
    assert (tmp_path / manifest.NAME).read_text() == before


# What a folder with a temporary name may hold alone under the name of a manifest, and is none.
NO_MANIFEST = {
    "a text": b"mine",
    "another object": b'{"format": 1, "title": "mine"}',
    "the manifest of another folder": manifest.as_text(**manifest.begun("photos")).encode(),
    "a larger file": bytes(5000),
}


@pytest.mark.parametrize("what", NO_MANIFEST)
def test_a_file_with_the_name_of_a_manifest_is_kept(what, tmp_path):
    (tmp_path / ".u.deadbeef").mkdir()
    (tmp_path / ".u.deadbeef" / manifest.NAME).write_bytes(NO_MANIFEST[what])
    aged(tmp_path)
    assert clean([str(tmp_path), "--delete"]) == 0
    assert (tmp_path / ".u.deadbeef" / manifest.NAME).read_bytes() == NO_MANIFEST[what]


@pytest.mark.parametrize("name", [".model.0a1b2c3d", "model"])
@pytest.mark.parametrize("size", [0, 1, 40, None, -1])
def test_the_beginning_of_a_manifest_is_removed(name, size, tmp_path):
    (tmp_path / ".model.0a1b2c3d").mkdir()
    written = manifest.as_text(**manifest.begun(name)).encode()
    (tmp_path / ".model.0a1b2c3d" / manifest.NAME).write_bytes(bytes(50) if size == -1 else written[:size])
    aged(tmp_path)
    assert clean([str(tmp_path), "--delete"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_long_names_in_a_manifest_take_linear_time(tmp_path, capsys):
    folder = write(tmp_path / ".model.0a1b2c3d", **{"config.json": "one", "params/a": "1"})
    about = json.loads((folder / manifest.NAME).read_text())
    (folder / "params" / "a").unlink()
    about["files"]["a/" * 500_000 + "b"] = 1
    manifest.write(folder, **about)
    start = time.process_time()
    assert manifest.foreign(folder) is None  # params/ is empty by now
    assert time.process_time() - start < 1
    (folder / "a").mkdir()
    assert manifest.foreign(folder) is None
    (folder / "aa").mkdir()
    assert "'aa' in it was not written" in str(manifest.foreign(folder))


def test_clean_keeps_what_may_be_in_use(tmp_path, capsys):
    (tmp_path / ".about.json.0000000a.jaxmodels").write_text("ha")
    assert clean([str(tmp_path), "--delete"]) == 0
    assert "1 may be in use" in capsys.readouterr().out
    assert (tmp_path / ".about.json.0000000a.jaxmodels").exists()
    assert clean([str(tmp_path / "nowhere")]) == 2


def test_a_manifest_lists_every_file(tmp_path):
    folder = write(tmp_path / "model", **{"config.json": "one", "params/a": "1"})
    about = json.loads((folder / manifest.NAME).read_text())
    assert about == {"format": 1, "complete": True, "files": {"config.json": 3, "params/a": 1}}


def test_a_full_disk_leaves_the_old_folder_whole(tmp_path):
    folder = write(tmp_path / "model", file="one")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write(folder, file="x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(folder) == {"file": "one"}
    assert list(tmp_path.iterdir()) == [folder]


# What a folder of others may hold, with a manifest that claims it.
FORGED = {
    "a link": (lambda path: path.symlink_to(path.parent.parent / "mine"), -1),
    "a FIFO": (os.mkfifo, -1),
    "a size that is no number": (lambda path: path.write_text("m"), True),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_manifest_claims_nothing(what, tmp_path):
    make, size = FORGED[what]
    (tmp_path / "mine").write_text("mine")
    folder = tmp_path / ".model.0a1b2c3d"
    folder.mkdir()
    make(folder / "x")
    manifest.write(folder, complete=True, files={"x": size})
    assert "'x' in it" in (manifest.foreign(folder) or "")
    aged(tmp_path)
    assert clean([str(tmp_path), "--delete"]) == 0
    assert os.path.lexists(folder / "x")


def test_a_manifest_is_a_file_that_lies_there_itself(tmp_path):
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text(json.dumps({"format": 1, "complete": True, "files": {"x": 1}}))
    for name in (".linked.0a1b2c3d", ".folder.0a1b2c3d"):
        (tmp_path / name).mkdir()
    (tmp_path / ".linked.0a1b2c3d" / manifest.NAME).symlink_to(elsewhere)
    (tmp_path / ".linked.0a1b2c3d" / "x").write_text("m")
    (tmp_path / ".folder.0a1b2c3d" / manifest.NAME).mkdir()
    (tmp_path / ".folder.0a1b2c3d" / manifest.NAME / "thesis.tex").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"\.linked\.0a1b2c3d"):
        manifest.begin(tmp_path / ".linked.0a1b2c3d")
    aged(tmp_path)
    assert clean([str(tmp_path), "--delete"]) == 0
    assert contents(tmp_path) == before


def test_a_manifest_with_another_name_elsewhere_is_replaced(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".a.0a1b2c3d").mkdir()
    os.link(tmp_path / "mine", tmp_path / ".a.0a1b2c3d" / manifest.NAME)
    manifest.begin(tmp_path / ".a.0a1b2c3d")
    assert (tmp_path / "mine").read_text() == "mine"
    assert manifest.read(tmp_path / ".a.0a1b2c3d")["complete"] is False


@pytest.mark.parametrize("kind", ["FIFO", "folder", "link to a device"])
def test_only_a_regular_file_is_replaced(kind, tmp_path):
    target = tmp_path / "scores.json"
    make = {"FIFO": os.mkfifo, "folder": Path.mkdir, "link to a device": lambda path: path.symlink_to("/dev/null")}
    make[kind](target)
    before = target.lstat()
    with pytest.raises(ValueError, match=r"scores\.json is a (FIFO|folder|device)"), atomic_file(target) as temporary:
        temporary.write_text("new")
    assert (target.lstat().st_ino, list(tmp_path.iterdir())) == (before.st_ino, [target])


def test_an_error_names_the_target_and_no_temporary_name(tmp_path):
    (tmp_path / "file").write_text("x")
    for write_to, name in ((atomic_file, "file/scores.json"), (atomic_folder, "file/model")):
        with pytest.raises(OSError, match=re.escape(str(tmp_path / "file"))) as caught, write_to(tmp_path / name):
            pass
        assert re.search(r"\.[0-9a-f]{8}", str(caught.value).removeprefix(str(tmp_path))) is None


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_others_write_to_the_target_meanwhile_is_kept(overwrite, tmp_path):
    target = tmp_path / "model"
    if overwrite:
        write(target, **{"config.json": "old"})

    def convert():
        with atomic_folder(target, overwrite=overwrite) as new:
            (new / "config.json").write_text("new")
            target.mkdir(exist_ok=True)
            (target / "thesis.tex").write_text("mine")

    with pytest.raises(ValueError, match=rf"{target} is not (empty|overwritten)"):
        convert()
    assert contents(target) == {"thesis.tex": "mine"} | ({"config.json": "old"} if overwrite else {})
    assert list(tmp_path.iterdir()) == [target]


def test_the_second_of_two_writers_of_a_new_folder_is_refused(tmp_path):
    target = tmp_path / "model"

    def second():
        with atomic_folder(target) as new:
            (new / "config.json").write_text("second")
            write(target, **{"config.json": "first"})

    with pytest.raises(ValueError, match=rf"{target} is not empty"):
        second()
    assert contents(target) == {"config.json": "first"}


def test_the_digits_of_a_temporary_name_have_a_letter_whatever_the_digest_begins_with():
    """Without one, the folder of a text whose digest begins with eight digits was no leftover to `jaxmodels clean`."""
    names = {atomic.unique(f"{number:08d}" + "0" * 56) for number in range(0, 10**8, 999_983)}
    assert all(atomic.TEMPORARY.fullmatch(f".tokens.{name}") for name in names)
    assert len(names) == 101
    assert atomic.unique("39619207") == atomic.unique("39619207") != atomic.unique()
