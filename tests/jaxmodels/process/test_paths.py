"""Folders that a user names."""

from pathlib import Path

import pytest

from jaxmodels.process.paths import is_plain, local


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


@pytest.mark.parametrize("name", ["a", "global_step7", "..a", "é.pt", "a" * 255])
def test_a_name_beside_a_file_is_plain(name):
    assert is_plain(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/", "/a", "a/", "a/b", "../a", "..\\a", "a\0", "a" * 256, "é" * 128, 7, None]
)
def test_a_name_of_another_place_is_not_plain(name):
    assert not is_plain(name)
