"""What the command lines of all scripts share: errors of one line, flags read ahead, and ends that are asked for."""

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Bad input, which this project reports as ValueError, and an OSError end the program with one line and code 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"{program}: {error}")
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)


def peek(arguments: Sequence[str], flag: str) -> str | None:
    """The value of a flag that decides the defaults of all others, before they are parsed; None where it is absent."""
    value = None
    for i, argument in enumerate(arguments):
        name, equals, after = argument.partition("=")
        if name == flag:
            value = after if equals else next(iter(arguments[i + 1 :]), None)
    return value


class Stop:
    """Whether the program was asked to end, and how: SIGTERM is a wish of the machine's, Ctrl-C one of the user's."""

    signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        return 130 if self.signal == signal.SIGINT else 0


@contextlib.contextmanager
def interruptible() -> Iterator[Stop]:
    """SIGTERM and the first Ctrl-C are noted, for the block to end in its own time; a second Ctrl-C interrupts."""
    stop = Stop()

    def ask(signum: int, frame: Any) -> None:
        stop.signal = signum
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
