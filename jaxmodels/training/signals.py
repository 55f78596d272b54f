"""SIGTERM, SIGHUP, Ctrl-C and closed pipes while training."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax

from jaxmodels.process.programs import is_repeated


class Stop:
    """Set by the first SIGTERM, SIGHUP or SIGINT, or if the reader of standard output closes it.

    The loop stops after the current step. `signal` is the number; a closed pipe counts as SIGPIPE.
    """

    signal: int | None = None
    raises = False  # in a block of `at_once`

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 141 if a pipe was closed; 0 after SIGTERM and SIGHUP, which a scheduler sends."""
        codes: dict[int | None, int] = {signal.SIGINT: 130, signal.SIGPIPE: 141}
        return codes.get(self.signal, 0)

    def pipe_closed(self) -> None:
        """The reader of standard output has closed it."""
        self.signal = self.signal or signal.SIGPIPE


class Stopped(KeyboardInterrupt):
    """A signal that a Stop records has ended a block of `at_once`."""


recording: list[Stop] = []  # Stops of the blocks of `interruptible` in this process, the innermost last


@contextlib.contextmanager
def interruptible() -> Iterator[Stop]:
    """Record SIGTERM, SIGHUP and the first Ctrl-C in a Stop instead of ending the block; a second Ctrl-C interrupts.

    SIGHUP stays ignored if it was (nohup). Outside of the main thread, which alone receives signals, does nothing.
    """
    stop = Stop()

    def handle(signum: int, frame: Any) -> None:
        stop.signal = signum
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])
        if stop.raises and not is_repeated(signum, frame):
            stop.raises = False  # what ends now is not ended by a second signal
            raise Stopped

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before = {number: signal.signal(number, handle) for number in numbers}
    recording.append(stop)
    try:
        yield stop
    finally:
        recording.remove(stop)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Context in which a signal that a Stop records raises Stopped: long work that asks no Stop, and may end anywhere.

    Raises Stopped at the beginning if the signal came before. Without effect outside of `interruptible`, and with
    several processes, which stop together.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    if not recording or not main_thread or jax.distributed.is_initialized():
        yield
        return
    stop = recording[-1]
    before, stop.raises = stop.raises, True
    try:
        if stop:
            raise Stopped
        yield
    finally:
        stop.raises = before
