"""Progress of work on bytes: a bar on a terminal, else a line every ten seconds."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

EVERY = 10.0  # seconds from one line to the next
SHOWN_AFTER = 1.0  # seconds; a bar for less flickers


@contextlib.contextmanager
def progress(description: str) -> Iterator[Callable[[int, int, str], None]]:
    """Context with a function to call with the bytes done, their total, and a text to show beside them.

    Writes to standard error. The bar needs `rich`.
    """
    with contextlib.ExitStack() as stack:
        begin = last = time.monotonic()
        show = None

        def report(done: int, total: int, about: str) -> None:
            nonlocal last, show
            now = time.monotonic()
            if sys.stderr.isatty():
                if show is None and now - begin > SHOWN_AFTER:
                    show = stack.enter_context(bar(description))
                if show is not None:
                    show(done, total, about)
            elif now - last > EVERY:
                last = now
                share = 100 * done / max(total, 1)
                print(f"{description}: {share:.0f} % of {total / 1e6:,.0f} MB, {about}", file=sys.stderr, flush=True)

        yield report


@contextlib.contextmanager
def bar(description: str) -> Iterator[Callable[[int, int, str], None]]:
    """Context with a function that moves a progress bar; it does nothing if `rich` is missing."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        yield lambda done, total, about: None
        return
    texts = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[about]}", markup=False)
    columns = (texts[0], BarColumn(), DownloadColumn(), texts[1], TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(description, total=None, about="")
        yield lambda done, total, about: shown.update(task, completed=done, total=total, about=about)
