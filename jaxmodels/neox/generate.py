"""`python -m jaxmodels.neox.generate`, the earlier name of `jaxmodels generate`; see `jaxmodels.generate.command`."""

import sys
from collections.abc import Sequence

from jaxmodels.generate import command
from jaxmodels.generate.command import parser as parser
from jaxmodels.process import programs

PROGRAM = "python -m jaxmodels.neox.generate"


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Continue prompts and return the exit code; `prog` is the command as typed."""
    return command.main(argv, prog)


if __name__ == "__main__":
    sys.exit(programs.run(main, PROGRAM))
