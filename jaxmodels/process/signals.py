"""SIGTERM and Ctrl-C while training."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class Stop:
    """Set by the first SIGTERM or SIGINT; the loop stops after the current step. `signal` is its number."""

    signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C; 0 after SIGTERM, which a scheduler sends."""
        return 130 if self.signal == signal.SIGINT else 0


@contextlib.contextmanager
def interruptible() -> Iterator[Stop]:
    """Record SIGTERM and the first Ctrl-C in a Stop instead of interrupting the block; a second Ctrl-C interrupts."""
    stop = Stop()

    def handle(signum: int, frame: Any) -> None:
        stop.signal = signum
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
