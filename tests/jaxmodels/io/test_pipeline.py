"""Tasks in threads, and writes to positions in a file."""

import os
import threading

import numpy as np
import pytest

from jaxmodels.io import pipeline
from jaxmodels.io.pipeline import run_in_threads, start_writeback, write_at


def test_two_run_at_a_time_and_results_come_in_order():
    both = threading.Barrier(2, timeout=60)
    done = []

    def task(i):
        both.wait()  # raises if this task runs alone
        return i

    run_in_threads((lambda i=i: task(i) for i in range(10)), done.append)
    assert done == list(range(10))


def test_an_error_is_raised_and_no_more_tasks_begin():
    begun = []

    def task(i):
        begun.append(i)
        if i == 5:
            raise ValueError("number 5")
        return i

    with pytest.raises(ValueError, match="number 5"):
        run_in_threads((lambda i=i: task(i) for i in range(1000)), lambda n: None)
    assert 5 in begun
    assert len(begun) <= 6 + 2 * pipeline.THREADS


def test_few_tasks_wait():
    """The tasks are made as they are needed, so that what they hold is not in memory at once."""
    made, finished = [], []
    ahead = []

    def tasks():
        for i in range(50):
            made.append(i)
            ahead.append(len(made) - len(finished))
            yield lambda i=i: i

    run_in_threads(tasks(), finished.append)
    assert max(ahead) <= 2 * pipeline.THREADS
    assert len(finished) == 50


@pytest.mark.parametrize("at_a_time", [1, 7, 10_000])
def test_values_are_written_at_their_position_in_any_order(tmp_path, monkeypatch, at_a_time):
    """Also where the system writes only a part, and across the blocks that are written to disk together."""
    monkeypatch.setattr(pipeline, "BLOCK_BYTES", 64)
    pwrite, blocks = os.pwrite, []
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:at_a_time], offset))
    monkeypatch.setattr(pipeline, "start_writeback", lambda fd, *block: blocks.append(block))
    values = np.random.default_rng(0).integers(0, 1000, (5, 13)).astype(np.int16)
    with (tmp_path / "file").open("wb", buffering=0) as file:
        assert write_at(file.fileno(), 3 + values[:2].nbytes, values[2:]) == values[2:].nbytes
        assert write_at(file.fileno(), 3, values[:2]) == values[:2].nbytes
        assert write_at(file.fileno(), 0, np.frombuffer(b"abc", np.uint8)) == 3
    assert (tmp_path / "file").read_bytes() == b"abc" + values.tobytes()
    assert blocks == [(0, 128)]  # 55 to 133; 3 to 55 and 0 to 3 end in no block


def test_writing_to_disk_may_not_be_begun(tmp_path, monkeypatch):
    with (tmp_path / "file").open("wb") as file:
        start_writeback(file.fileno())
        monkeypatch.setattr(pipeline, "sync_file_range", lambda: None)
        start_writeback(file.fileno())
