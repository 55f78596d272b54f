"""Progress of a run: a bar on a terminal, elsewhere a line every ten seconds."""

import collections
import contextlib
import threading
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

SECONDS = 10.0  # from one line to the next
AVERAGED = 20  # steps
WITHOUT_BAR = 100  # characters of all columns but the bar


class CutColumn(TextColumn):
    """Column whose text a narrow terminal cuts off, so that the others stay whole."""

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class Line:
    """Steps, mean loss and tokens per second of the last steps, share of the devices' peak if it is known, time left.

    tokens, flops: of a step. peak: FLOP/s of all devices, or None.
    """

    def __init__(self, console: Console, steps: int, done: int, tokens: int, flops: float, peak: float | None):
        self.console, self.steps, self.done = console, steps, done
        self.tokens, self.flops, self.peak = tokens, flops, peak
        self.losses: collections.deque[float] = collections.deque(maxlen=AVERAGED)
        self.seconds: collections.deque[float] = collections.deque(maxlen=AVERAGED)
        self.activity, self.began = "", time.monotonic()
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None
        self.progress: Progress | None = None
        if console.is_terminal:
            step, left = TextColumn("step {task.completed}/{task.total}"), TextColumn("left")
            shown = CutColumn("{task.fields[shown]}", table_column=Column())
            time_left = TimeRemainingColumn(table_column=Column(no_wrap=True))
            bar = BarColumn(max(4, console.width - WITHOUT_BAR), table_column=Column(no_wrap=True))
            self.progress = Progress(step, bar, shown, time_left, left, console=console)
            self.task = self.progress.add_task("training", total=steps, completed=done, shown="")

    def __enter__(self) -> "Line":
        if self.progress is not None:
            self.progress.start()
        else:
            self.thread = threading.Thread(target=self.print_lines, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        if self.progress is not None:
            self.progress.stop()
        if self.thread is not None:
            self.thread.join()
            if self.losses:
                self.console.print(self.text())

    def print_lines(self) -> None:
        """Print a line every ten seconds until the run ends; runs in a thread, also while a step compiles."""
        while not self.ended.wait(SECONDS):
            self.console.print(self.text())

    @contextlib.contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Show what the run does meanwhile instead of a step."""
        self.activity, self.began = activity, time.monotonic()
        self.update()
        try:
            yield
        finally:
            self.activity = ""
            self.update()

    def advance(self, loss: float, seconds: float, share: float = 1.0) -> None:
        """Add a step. share: part of a full step's tokens that it used."""
        self.done += 1
        self.losses.append(loss)
        self.seconds.append(seconds / share)
        if self.progress is not None:
            self.progress.update(self.task, advance=1, shown=self.shown())

    def update(self) -> None:
        if self.progress is not None:
            self.progress.update(self.task, shown=self.shown())

    def text(self) -> str:
        """The line where there is no terminal."""
        parts = [f"step {self.done}/{self.steps}", self.shown()]
        mean = self.mean_seconds()
        if mean:
            minutes, seconds = divmod(round(mean * (self.steps - self.done)), 60)
            parts.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
        return ", ".join(filter(None, parts))

    def shown(self) -> str:
        """Text beside the number of steps: nothing before the first one."""
        parts = []
        if self.activity:
            parts.append(f"{self.activity} for {time.monotonic() - self.began:.0f} s")
        if self.losses:
            n = len(self.losses)
            parts.append(f"loss {sum(self.losses) / n:.3f} (mean of {n} step{'s' if n > 1 else ''})")
        mean = self.mean_seconds()
        if mean and not self.activity:
            parts.append(f"{self.tokens / mean:,.0f} tokens/s")
            if self.peak is not None:
                parts.append(f"{self.flops / mean / self.peak:.0%} of peak")
        return ", ".join(parts)

    def mean_seconds(self) -> float:
        """Seconds of a step, over the last ones; 0 before the first."""
        return sum(self.seconds) / len(self.seconds) if self.seconds else 0.0
