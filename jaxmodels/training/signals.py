"""SIGTERM and Ctrl-C, and errors that end a program with one line."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """End the program on ValueError or OSError with one line and code 1, on KeyboardInterrupt with code 130."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"{program}: {error}")
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)


def exit_code(program: str, work: Callable[[], object]) -> int:
    """Call a function: 0 when it returns; 2 and one line on standard error if it raises ValueError or OSError.

    130 if it is interrupted.
    """
    try:
        work()
    except (ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    return 0


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
