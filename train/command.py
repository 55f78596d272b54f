"""What the command lines of all scripts share."""

import contextlib
import sys
from collections.abc import Iterator, Sequence


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
