"""Progress of a long check: one line on a terminal, rewritten in place; elsewhere a line for each item that ended."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self, TextIO

from jaxmodels.process.texts import visible

CLEAR = "\r\x1b[K"  # to the start of the line; erase to its end


class StatusLine:
    """A line that shows what is running and for how long; a context manager, which erases the line at its end.

    stream: standard error by default. If it is no terminal that can erase a line, only `finished` writes to it.
    """

    def __init__(self, stream: TextIO | None = None, interval: float = 1.0):
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.interval = interval
        self.shown, self.since = "", 0.0
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.clock = threading.Thread(target=self.tick, daemon=True)

    def __enter__(self) -> Self:
        if self.live:
            self.clock.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.ended.set()
        if self.live:
            self.clock.join()
        self.clear()

    def show(self, text: str) -> None:
        """Replace the line."""
        with self.lock:
            self.shown, self.since = visible(text), time.monotonic()
            self.draw()

    def finished(self, text: str) -> None:
        """Erase the line; where there is none, in a pipe or a file, write what ended as a line of its own."""
        self.clear()
        if not self.live:
            self.write(visible(text) + "\n")

    def clear(self) -> None:
        """Erase the line, so that other output can be printed."""
        with self.lock:
            if self.live and self.shown:
                self.write(CLEAR)
            self.shown = ""

    def tick(self) -> None:
        while not self.ended.wait(self.interval):
            with self.lock:
                self.draw()

    def draw(self) -> None:
        if self.live and self.shown:
            seconds = f"  {time.monotonic() - self.since:.0f} s"
            room = max(self.columns() - 1 - len(seconds), 1)
            self.write(CLEAR + self.shown[:room] + seconds)

    def columns(self) -> int:
        """Width of the terminal, 80 if it is unknown."""
        try:
            return os.get_terminal_size(self.stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80

    def write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


def each(names: Sequence[str], line: StatusLine) -> Iterator[tuple[str, Callable[[str], None]]]:
    """Iterate over names; yields each name and a function that shows its current stage on the line.

    Of several names, a line tells when each has ended, with the seconds since the first began.
    """
    began = time.monotonic()
    for i, name in enumerate(names, 1):
        title = f"{i}/{len(names)} {name}"
        line.show(title)

        def stage(text: str, title: str = title) -> None:
            line.show(f"{title}: {text}")

        yield name, stage
        line.clear()
        if len(names) > 1:
            line.finished(f"{title}: done, {time.monotonic() - began:.0f} s")
