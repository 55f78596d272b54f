"""Files that do not fit on the disk, and processes that are killed: real processes, and what they leave."""

import json
import subprocess
import sys

import pytest

from tests.train_common import ROOT


def started(*arguments: str) -> str:
    """Standard output of a module; what libraries report on standard error is a failure."""
    command = [sys.executable, "-m", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Traceback" not in run.stderr
    return run.stdout


@pytest.mark.slow
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    """Files may have a few thousand bytes: the operating system refuses more, as it does on a full disk."""
    found = [json.loads(line) for line in started("tests.jaxmodels.io.full_disk", str(tmp_path)).splitlines()]
    files = {"pt": "model.pt", "safetensors": "hf/model.safetensors", "model": "model/params"}
    files |= {"index": "index/index-0000000200.faiss", "tokens": "train.npy", "text": "report.json"}
    assert [name for name, _, _ in found] == list(files)
    for name, error, left in found:
        assert error.startswith("OSError: [Errno 27] File too large: ")
        assert files[name] in error
        assert name in ("tokens", "text") or left == []  # ids that were made are kept, and work goes on with them


@pytest.mark.slow
@pytest.mark.parametrize("name", ["file", "folder", "folder, renamed twice"])
def test_a_kill_before_any_operation_on_a_file_leaves_old_or_new(name):
    points = int(started("tests.jaxmodels.io.kills", name, "1"))
    assert points >= (3 if name == "file" else 15)


@pytest.mark.slow
def test_tokenizing_that_is_killed_before_any_operation_on_a_file_can_be_continued():
    assert int(started("tests.jaxmodels.io.kills", "tokens", "1")) >= 40


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stride", "least"), [("hf", 4, 3), ("index", 9, 4), ("model", 13, 3), ("fixture", 1, 6)]
)
def test_checkpoints_indexes_and_fixtures_whose_writer_is_killed_are_whole_and_what_is_left_is_removed(
    name, stride, least
):
    """Some points of each; `python -m tests.jaxmodels.io.kills model 1` tries all of them."""
    assert int(started("tests.jaxmodels.io.kills", name, str(stride))) >= least
