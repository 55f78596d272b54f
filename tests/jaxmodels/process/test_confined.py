"""Work in a child process: what takes too long, swells or ends it is a ValueError, and the next call goes on."""

import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxmodels.process.confined import Confined

MODULE = "tests.jaxmodels.process.confined_operations"
MEANS = {"seconds": 0.3, "megabytes": 200.0}


@pytest.fixture(scope="module")
def confined():
    return Confined(MODULE, 7, seconds=5.0, megabytes=300.0)


def test_operations_run_in_another_process(confined):
    assert confined.call("add", 4, **MEANS) == 11
    assert confined.call("process", **MEANS) not in (os.getpid(), None)
    assert confined.call("echo", "ü\n\u2028" * 10_000, **MEANS) == "ü\n\u2028" * 10_000


def test_bytes_are_sent_as_they_are(confined):
    parts = "\n", "", "é\n"
    assert confined.call("attach", *parts, **MEANS) == (3, "\né\n".encode())
    assert confined.call("attach", **MEANS) == (0, b"")
    assert confined.call("add", 1, **MEANS) == 8


def test_it_is_closed_and_starts_again():
    confined = Confined(MODULE, 7, seconds=5.0, megabytes=300.0)
    confined.close()
    first = confined.call("process", **MEANS)
    confined.close()
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert confined.call("process", **MEANS) != first
    confined.close()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hang", "^it takes more than 0 s$"),
        ("swell", "^it takes more than 200 MB$"),
        ("abort", "^it takes more than 200 MB, or aborts$"),
        ("fault", f"^it ends its process with code -{int(signal.SIGSEGV)}$"),
        ("leave", "^it ends its process with code 3$"),
        ("fail", "^first line$"),
        ("panic", "^index out of bounds$"),
    ],
)
def test_what_it_does_is_one_line_and_the_next_call_goes_on(confined, name, said, capfd):
    began = time.monotonic()
    with pytest.raises(ValueError, match=said):
        confined.call(name, **MEANS)
    assert time.monotonic() - began < 10
    assert confined.call("add", 1, **MEANS) == 8
    assert capfd.readouterr() == ("", "")


def test_an_operation_that_waits_is_ended(confined):
    with pytest.raises(ValueError, match="it takes more than 0 s"):
        confined.call("sleep", seconds=0.01, megabytes=10.0)


def test_another_thread_is_interrupted(confined):
    def call():
        with pytest.raises(KeyboardInterrupt):
            confined.call("hang", seconds=60.0, megabytes=10.0)
        ended.append(time.monotonic())

    ended: list[float] = []
    confined.start()
    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.1)
    confined.interrupt()
    began = time.monotonic()
    thread.join()
    assert ended[0] - began < 5
    assert confined.call("add", 1, **MEANS) == 8


def test_what_cannot_start_is_refused_every_time(capfd):
    broken = Confined(MODULE, None, seconds=1.0, megabytes=100.0)
    for _ in range(2):
        with pytest.raises(ValueError, match="argument is null"):
            broken.call("add", 1, **MEANS)
    assert capfd.readouterr() == ("", "")


def test_a_copy_has_a_process_of_its_own(confined):
    first = confined.call("process", **MEANS)
    for other in (copy.deepcopy(confined), pickle.loads(pickle.dumps(confined))):
        assert other.call("process", **MEANS) != first
        assert other.call("add", 1, **MEANS) == 8


def test_the_process_is_replaced_if_it_was_killed_and_ends_with_its_object():
    confined = Confined(MODULE, 7, seconds=5.0, megabytes=300.0)
    first = confined.call("process", **MEANS)
    os.kill(first, signal.SIGKILL)
    confined.child.process.wait()
    second = confined.call("process", **MEANS)
    assert first != second
    del confined
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)


def test_it_ends_if_its_parent_is_killed_and_not_at_ctrl_c():
    program = f"from {Confined.__module__} import Confined; c = Confined({MODULE!r}, 7, seconds=5, megabytes=300)\n"
    program += "print(c.call('process', seconds=1, megabytes=100), flush=True); input()"
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    os.kill(child, signal.SIGINT)
    time.sleep(0.1)
    os.kill(child, 0)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    command = Path(f"/proc/{child}/cmdline")  # empty for a process that has ended, if nobody has asked for its code
    while command.exists() and command.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.02)
