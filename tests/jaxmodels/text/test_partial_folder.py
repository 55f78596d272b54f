"""The folder in which ids are made: nothing of others in it is written over or removed."""

import pytest

from jaxmodels.text.partial import locked


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
