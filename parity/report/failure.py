"""Text that pytest prints for a failing test, in place of a traceback; used by `parity.plugin`."""

import dataclasses
import shutil
from typing import Any

from jaxmodels.process.texts import visible
from parity.report.outcome import Outcome
from parity.report.text import WIDTH, folded, short, text


@dataclasses.dataclass(frozen=True)
class Crash:
    """Place where a test failed, and its line in pytest's summary."""

    path: str
    lineno: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.lineno}: {self.message}"


@dataclasses.dataclass(frozen=True)
class Failure:
    """The representation of a failure, with the attributes that pytest reads from one.

    brief: for --tb=line, with which pytest prints the line of `reprcrash` itself.
    """

    text: str
    reprcrash: Crash
    brief: bool = False

    def toterminal(self, writer: Any) -> None:
        """Write to pytest's terminal: the first line and failed readings in red."""
        if self.brief:
            return
        for i, line in enumerate(self.text.splitlines()):
            writer.line(line, red=i == 0 or line.startswith("  FAILED"), bold=i == 0)
        writer.line(f"{self.reprcrash.path}:{self.reprcrash.lineno}")

    def __str__(self) -> str:
        return f"{self.text}\n{self.reprcrash.path}:{self.reprcrash.lineno}"


def differs(report: Outcome, path: str, line: int, *, whole: bool) -> Failure:
    """A pair that differs: the first divergence and the failed readings, or the whole report and the tree."""
    shown = short(report, width())
    if whole:
        tree = report.divergence.tree() if report.divergence else ""
        shown = f"{text(report, width())}\n{folded(tree, width())}".rstrip()
    return Failure(shown, Crash(path, line, visible(f"{report.name}: {report.divergence or report.verdict}")))


def refusal(error: ValueError, path: str, line: int) -> Failure:
    """Arguments that were refused: the message."""
    message = f"{type(error).__name__}: {error}"
    return Failure(folded(message, width()), Crash(path, line, visible(message.partition("\n")[0])))


def width() -> int:
    """Width of the terminal, at most that of a report."""
    return min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
