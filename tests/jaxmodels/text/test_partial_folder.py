"""The folder in which ids are made: nothing of others in it is written over or removed."""

import os

import numpy as np
import pytest

from jaxmodels.text import ByteVocabulary, tokens
from jaxmodels.text.partial import Growing, locked
from jaxmodels.text.sources import open_sources
from jaxmodels.text.tokens import write_sources


@pytest.mark.parametrize("kind", ["a file", "a dated file", "a link in it", "a link"])
def test_a_folder_with_anything_foreign_is_refused(kind, tmp_path):
    folder, mine = tmp_path / ".tokens.0123abcd", tmp_path / "photos"
    mine.mkdir()
    (mine / "1.jpg").write_text("mine")
    if kind == "a link":
        folder.symlink_to(mine)
    else:
        folder.mkdir()
        name = ".notes.20241126" if kind == "a dated file" else "1.jpg"
        (folder / "train.npy").symlink_to(mine / "1.jpg") if "link" in kind else (folder / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=str(folder)), locked(folder):
        pytest.fail("it was opened")
    assert sorted(tmp_path.rglob("*")) == before
    assert (mine / "1.jpg").read_text() == "mine"


@pytest.mark.parametrize("kind", ["FIFO", "file with 2 names", "symbolic link"])
def test_a_file_that_is_written_in_place_lies_there_itself(kind, tmp_path):
    folder, mine = tmp_path / ".tokens.0123abcd", tmp_path / "mine"
    folder.mkdir()
    mine.write_text("mine")
    for name in ("lock", "train.npy"):
        path = folder / name
        if kind == "FIFO":
            os.mkfifo(path)
        elif kind == "symbolic link":
            path.symlink_to(mine)
        else:
            os.link(mine, path)
        with pytest.raises(ValueError, match=f"{path} is a {kind}"):
            locked(folder).__enter__() if name == "lock" else Growing(path, np.uint8)
        path.unlink()
    assert mine.read_text() == "mine"


def test_a_target_that_was_written_meanwhile_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("to be or not to be")
    sources, target = open_sources(str(tmp_path / "a.txt")), tmp_path / "tokens"
    write_sources(target, sources, ByteVocabulary())
    monkeypatch.setattr(tokens, "encode_to", None)
    with pytest.raises(ValueError, match=f"^{target} is not empty"):
        write_sources(target, sources, ByteVocabulary())
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "tokens"]
