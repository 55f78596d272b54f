"""Progress bar for reading and writing checkpoints."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jaxmodels.process.texts import visible
from jaxmodels.weights.lazy import nbytes

SHOWN_FROM = 500_000_000  # bytes; less takes only seconds


@contextlib.contextmanager
def progress_bar(description: str, tensors: Iterable[Any]) -> Iterator[Callable[[int], None]]:
    """Context with a function to call with numbers of bytes done; shown on a terminal if `rich` is installed."""
    total = sum(map(nbytes, tensors))
    if total < SHOWN_FROM or not sys.stderr.isatty():
        yield lambda n: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        yield lambda n: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(visible(description), total=total)
        yield lambda n: bar.advance(task, n)
