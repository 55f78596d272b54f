"""Exit codes of the project's commands. Imports the standard library alone."""

import os
import sys
from collections.abc import Callable


def run(main: Callable[[], int | None], command: str) -> int:
    """Call a command's main function and return the exit code of its process, with one line for each expected failure.

    0 or what `main` returns; 2 for a ValueError, an OSError or a missing package; 130 for Ctrl-C; 141 if the reader of
    a pipe has closed it (`… | head`). Any other exception is a bug and keeps its traceback.

    command: prefix of the line, e.g. "jaxmodels convert".
    """
    try:
        code = main()
        sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The interpreter flushes standard output once more as it exits, and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2
