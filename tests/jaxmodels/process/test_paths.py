"""Folders that a user names, and those of others that are searched."""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxmodels import command
from jaxmodels.io import clean, manifest
from jaxmodels.io.atomic import check_target
from jaxmodels.io.checkpoint import check_files
from jaxmodels.process.arguments import Parser
from jaxmodels.process.paths import DEEPEST, below, is_plain, local, resolved, walk
from jaxmodels.text.sources import files_of


def test_the_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert local("~/runs/a b", "out") == Path("/home/somebody/runs/a b")
    for path in ("runs/~x", "a:b/c", "/x", "nothing"):
        assert local(path, "out") == Path(path)
    with pytest.raises(ValueError, match=r"^out=~nobody-here/run: .*\./~nobody-here$"):
        local("~nobody-here/run", "out")


@pytest.mark.parametrize("given", ["gs://bucket/a/run", Path("gs://bucket/a/run")])
def test_a_bucket_is_refused_with_how_to_mount_it(given):
    with pytest.raises(ValueError, match=r"^out=gs://bucket/a/run .*gcsfuse bucket .*out=/mnt/bucket/a/run$"):
        local(given, "out")
    with pytest.raises(ValueError, match=r"^resume=hdfs://"):
        local("hdfs://x/y", "resume")


def test_a_link_that_leads_to_itself_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    for name, goal in {"loop": "loop", "a": "b", "b": "a", "link": "folder", "dangling": "missing"}.items():
        (tmp_path / name).symlink_to(goal)
    for name in ("loop", "a", "loop/inside", "folder/../b"):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
            resolved(tmp_path / name)
    for name, goal in {
        "link/new": "folder/new",
        "dangling": "missing",
        "folder": "folder",
        "folder/x/y": "folder/x/y",
    }.items():
        assert resolved(str(tmp_path / name)) == (tmp_path / name).resolve() == tmp_path.resolve() / goal


def test_a_folder_that_is_a_link_to_itself_is_no_target(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "file").touch()
    for target, sources in ((tmp_path / "loop", ()), (tmp_path / "target", [tmp_path / "loop"])):
        with pytest.raises(ValueError, match=r"/loop .*link"):
            check_target(target, overwrite=True, sources=sources)
    assert (tmp_path / "loop").is_symlink()


@pytest.mark.parametrize("name", ["a", "global_step7", "..a", "é.pt", "a" * 255])
def test_a_name_beside_a_file_is_plain(name):
    assert is_plain(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/", "/a", "a/", "a/b", "../a", "..\\a", "a\0", "a" * 256, "é" * 128, 7, None]
)
def test_a_name_of_another_place_is_not_plain(name):
    assert not is_plain(name)


@pytest.fixture
def deep(tmp_path) -> Iterator[Path]:
    """A folder for thousands of folders inside each other, which Python's own rmtree could not remove."""
    (tmp_path / "deep").mkdir()
    yield tmp_path / "deep"
    subprocess.run(["rm", "-rf", str(tmp_path / "deep")], check=True)


def nested(folder: Path, depth: int) -> Path:
    """A folder with `depth` folders inside each other."""
    inner = folder.joinpath(*["d"] * depth)
    for part in range(0, depth + 1, 50):
        folder.joinpath(*["d"] * part).mkdir(parents=True, exist_ok=True)
    inner.mkdir(parents=True, exist_ok=True)
    return inner


def test_walk_finds_what_os_walk_does(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for file in ("1", "a/2", "a/b/3"):
        (tmp_path / file).touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    (tmp_path / "itself").symlink_to(tmp_path / "itself")

    def found(walked):
        return sorted((str(here), sorted(folders), sorted(files)) for here, folders, files in walked)

    assert found(walk(tmp_path)) == found(os.walk(tmp_path))
    assert sorted(below(tmp_path)) == sorted(tmp_path.rglob("*"))
    assert list(walk(tmp_path / "1")) == list(walk(tmp_path / "absent")) == []


def test_folders_that_are_nested_thousands_deep_are_refused_by_name(deep):
    deepest = nested(deep, DEEPEST)
    assert len(list(walk(deep))) == DEEPEST + 1
    nested(deepest, 1_200)
    left_out: list[Path] = []
    assert len(list(walk(deep, left_out.append))) == DEEPEST + 1
    assert left_out == [deepest / "d"]
    manifest.refuse_links(deep)  # looks into no folder inside
    readers = (below, check_files, files_of, lambda folder: list(manifest.sizes(folder)))
    for read in readers:
        with pytest.raises(ValueError, match=rf"^{re.escape(str(deep))} has folders nested more than {DEEPEST}"):
            list(read(deep) or ())


def test_commands_on_folders_that_are_nested_thousands_deep_end_with_one_line(deep, capsys):
    (deep / ".jaxmodels.json").write_text('{"format": 1, "complete": true, "files": {}}')
    nested(deep / "checkpoints" / "12", 1_200)
    assert clean.main([str(deep)]) == 0
    printed = capsys.readouterr()
    assert "nothing to remove" in printed.out
    assert printed.err.count("\n") == 1
    with pytest.raises(ValueError, match="nested more than"):
        check_target(deep, overwrite=True)
    assert command.main(["inspect", str(deep)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_path_that_is_too_long_is_left_out(deep):
    here = os.open(deep, os.O_RDONLY)
    try:
        for _ in range(20):
            os.mkdir("d" * 250, dir_fd=here)
            inner = os.open("d" * 250, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = inner
    finally:
        os.close(here)
    with pytest.raises(ValueError, match="too long a path"):
        list(walk(deep))


@pytest.mark.parametrize("now", [1e15, -1e15])
def test_clean_lists_a_file_of_any_time(tmp_path, capsys, monkeypatch, now):
    """Some file systems hold times of 2⁶² seconds."""
    (tmp_path / ".mine.abcdef01.jaxmodels").touch()
    monkeypatch.setattr(time, "time", lambda: now)
    assert clean.main([str(tmp_path), "--delete"]) == 0
    assert "1000000 days" in capsys.readouterr().out


def test_clean_goes_on_beside_what_is_of_another_user(tmp_path, capsys, monkeypatch):
    theirs = tmp_path / ".theirs.abcdef01"
    listed, kept = tmp_path / "listed" / ".a.abcdef01.jaxmodels", tmp_path / "kept" / ".b.abcdef01.jaxmodels"
    (theirs / "inside").mkdir(parents=True)
    (tmp_path / "listed" / "inside").mkdir(parents=True)
    (tmp_path / "kept").mkdir()
    mine = tmp_path / ".mine.abcdef01.jaxmodels"
    for file in (listed, kept, mine):
        file.write_text("")
        os.utime(file, (time.time() - 2 * manifest.SETTLED,) * 2)
    tmp_path.chmod(0o777)
    monkeypatch.chdir(tmp_path)  # the folders above are forbidden too
    user = os.geteuid()
    for folder, mode in ((theirs, 0), (tmp_path / "listed", 0o444), (tmp_path / "kept", 0o555)):
        folder.chmod(mode)
    try:
        os.seteuid(user or 65534)  # to root, nothing is forbidden
        assert clean.main([".", "--delete"]) == 0
    finally:
        os.seteuid(user)
        for folder in (theirs, tmp_path / "listed", tmp_path / "kept"):
            folder.chmod(0o755)
    out, err = capsys.readouterr()
    assert "removed 1, 0 bytes" in out
    assert err == "kept/.b.abcdef01.jaxmodels is kept: Permission denied\n"
    assert theirs.exists()
    assert listed.exists()
    assert kept.exists()
    assert not mine.exists()


def test_a_folder_with_the_name_of_a_home_is_named_by_the_folder_it_is_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/of/somebody")
    parser = Parser()
    parser.add_argument("file", type=Path)
    for named in ("~/a", "~nobody.of.that.name/a"):
        assert local(f"./{named}", "out") == tmp_path / named
        assert parser.parse_args([f"./{named}"]).file == tmp_path / named
    assert local("~/a", "out") == parser.parse_args(["~/a"]).file == Path("/home/of/somebody/a")
