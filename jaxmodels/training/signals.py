"""SIGTERM, SIGHUP, Ctrl-C and closed pipes while training."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Stop:
    """Set by the first SIGTERM, SIGHUP or SIGINT, or if the reader of standard output closes it.

    The loop stops after the current step. `signal` is the number; a closed pipe counts as SIGPIPE.
    """

    signal: int | None = None

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

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
