"""Parser of a command's arguments: `argparse`, with errors that are fit for a terminal."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from jaxmodels.process.paths import at_home
from jaxmodels.process.texts import shortened


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` whose errors repeat an argument with its control characters escaped, and shortened.

    The parsers of subcommands that it adds are of this class too. `~` is expanded in arguments of type Path: a shell
    leaves it in `--out=~/FILE`.
    """

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.register("type", Path, expanded)

    def error(self, message: str) -> NoReturn:
        """Print the usage and an error, and exit with code 2."""
        super().error(shortened(message))


def expanded(text: str) -> Path:
    """Path with `~` expanded; raises argparse.ArgumentTypeError for `~NAME` if there is no such user."""
    try:
        return at_home(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text}: {Path(text).parts[0]} is no user's home folder") from None


@contextlib.contextmanager
def errors_escaped() -> Iterator[None]:
    """Context in which the errors of every parser are as those of `Parser`: for the command line of a library."""
    error = argparse.ArgumentParser.error

    def escaped(parser: argparse.ArgumentParser, message: str) -> NoReturn:
        error(parser, shortened(message))

    argparse.ArgumentParser.error = escaped  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        argparse.ArgumentParser.error = error  # type: ignore[method-assign]
