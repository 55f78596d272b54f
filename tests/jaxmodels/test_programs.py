"""Exit codes of commands."""

import gc
import os
import signal
import time

import pytest

from jaxmodels.programs import run


@pytest.fixture
def callback():
    """Registers a callback of the garbage collector that receives Ctrl-C, as JAX's may."""

    def interrupted(phase, info):
        if phase == "stop" and calls:
            calls.pop()
            os.kill(os.getpid(), signal.SIGINT)
            sum(range(1000))

    calls = [1]
    gc.callbacks.append(interrupted)
    yield
    gc.callbacks.remove(interrupted)


def test_ctrl_c_during_garbage_collection_ends_the_command(callback, capsys):
    def main():
        gc.collect()
        time.sleep(10)

    began = time.monotonic()
    assert run(main, "command") == 130
    assert time.monotonic() - began < 5
    assert capsys.readouterr().err == "command: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_ends_the_command(capsys):
    assert run(lambda: os.kill(os.getpid(), signal.SIGINT) or time.sleep(10), "command") == 130
    assert capsys.readouterr().err == "command: interrupted\n"


def test_expected_failures_are_one_line(capsys):
    def fails():
        raise ValueError("size=3 must be even")

    assert run(fails, "command") == 2
    assert capsys.readouterr().err == "command: size=3 must be even\n"
    assert run(lambda: None, "command") == 0
    assert run(lambda: 1, "command") == 1
