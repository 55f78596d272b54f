"""Metrics of a run while it trains: the progress line, RUN/metrics.jsonl, TensorBoard files, and profiles.

metrics.jsonl has a line per step, {"step": 7, "loss": …, "grad_norm": …, "seconds": …}, and one per evaluation,
{"step": 500, "validation_loss": …}. Losses are in nats per token.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jaxmodels.io.atomic import atomic_file
from jaxmodels.io.bounded import read_text
from jaxmodels.io.steps import check_run
from jaxmodels.process.extras import require
from jaxmodels.process.texts import quoted

FILE = "metrics.jsonl"
LOSSES = ("loss", "validation_loss")
LARGEST = 2**30  # bytes of metrics.jsonl: ten million steps
TENSORBOARD_EVERY = 10  # steps; each number takes 50 bytes


def read(run: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's metrics.jsonl, except one truncated by a kill.

    Raises ValueError, naming the file, if it is missing, or if a line is not an object with a step and numbers.
    """
    check_run(run)
    try:
        text = read_text(run / FILE, LARGEST)
    except (OSError, ValueError) as error:
        raise ValueError(f"{run} holds no {FILE}: {error}") from None
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):  # ValueError: not JSON, or an integer of thousands of digits
            continue
        if not is_line(content):
            found = quoted(content)
            raise ValueError(f"{run / FILE}, line {number}, is {found}; expected an object with a step and numbers")
        lines.append(content)
    return lines


def is_line(content: Any) -> bool:
    """True for an object with a step, and with numbers as losses."""
    if not isinstance(content, dict) or type(content.get("step")) is not int or not 0 <= content["step"] < 2**63:
        return False
    losses = [content[name] for name in LOSSES if name in content]
    return all(type(loss) is float or (type(loss) is int and abs(loss) < 2**63) for loss in losses)


class Log:
    """metrics.jsonl and TensorBoard files of a run that has taken len(losses) steps; drops lines of later steps."""

    def __init__(self, run: Path, losses: Sequence[float], *, tensorboard: bool = True):
        run.mkdir(parents=True, exist_ok=True)
        kept = self.lines_until(run, losses)
        with atomic_file(run / FILE) as new:
            new.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self.file = open(run / FILE, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 (closed by close())
        self.writer = None
        if tensorboard:
            require("train", "tensorboardX")
            from tensorboardX import SummaryWriter

            self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=len(losses) + 1)

    @staticmethod
    def lines_until(run: Path, losses: Sequence[float]) -> list[dict[str, Any]]:
        """Lines to keep: one per step taken, and evaluations before the last step, which is evaluated again."""
        old = read(run) if (run / FILE).exists() else []
        steps = {line["step"]: line for line in old if "loss" in line}
        evaluations: dict[int, list[dict[str, Any]]] = {}
        for line in old:
            if "loss" not in line and line["step"] < len(losses):
                evaluations.setdefault(line["step"], []).append(line)
        kept = evaluations.get(0, [])
        for step, loss in enumerate(losses, start=1):
            kept.append({**steps.get(step, {}), "step": step, "loss": loss})
            kept += evaluations.get(step, [])
        return kept

    def write(self, step: int, values: dict[str, float], *, every: int = 1) -> None:
        """Write a line, and to TensorBoard if the step is a multiple of `every`."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        if self.writer is not None and step % every == 0:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def step(self, step: int, loss: float, grad_norm: float, seconds: float) -> None:
        values = {"loss": loss, "grad_norm": grad_norm, "seconds": round(seconds, 6)}
        self.write(step, values, every=TENSORBOARD_EVERY)

    def close(self) -> None:
        self.file.close()
        if self.writer is not None:
            self.writer.close()


class Trace:
    """Profile of `n` steps and the reports between them, written to a folder.

    It begins with the second step of this process; the first one is for warm-up.
    """

    def __init__(self, folder: Path, step: int, n: int):
        self.folder, self.bounds = folder, [step + 1, step + 1 + n] if n else []

    def until(self, step: int) -> int:
        """Next step, at most `step`, after which `at` must be called."""
        return min([step, *self.bounds])

    def at(self, step: int) -> None:
        """Start or stop the profile if it is due after this step."""
        if self.bounds[:1] == [step]:
            begins = len(self.bounds) == 2
            del self.bounds[0]
            jax.profiler.start_trace(str(self.folder)) if begins else jax.profiler.stop_trace()

    def close(self) -> None:
        """Stop the profile if it was started."""
        if len(self.bounds) == 1:
            self.bounds = []
            jax.profiler.stop_trace()


class Line:
    """Progress line: steps, loss, tokens per second, share of the devices' peak if it is known, time left.

    tokens, flops: of a step. peak: FLOP/s of all devices, or None.
    """

    def __init__(self, console: Console, steps: int, done: int, tokens: int, flops: float, peak: float | None):
        columns = ["step {task.completed}/{task.total}", "loss {task.fields[loss]:.3f}", "{task.fields[speed]}"]
        step, loss, speed = map(TextColumn, columns)
        self.progress = Progress(
            step, BarColumn(bar_width=None), loss, speed, TimeRemainingColumn(), TextColumn("left"), console=console
        )
        self.task = self.progress.add_task("training", total=steps, completed=done, loss=math.nan, speed="")
        self.tokens, self.flops, self.peak = tokens, flops, peak
        self.loss = self.seconds = math.nan

    def __enter__(self) -> "Line":
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def advance(self, loss: float, seconds: float, share: float = 1.0) -> None:
        """Add a step; shows averages over about twenty. share: part of a full step's tokens that it used."""
        self.loss = smooth(self.loss, loss)
        self.seconds = smooth(self.seconds, seconds / share)
        self.progress.update(self.task, advance=1, loss=self.loss, speed=self.speed())

    def speed(self) -> str:
        if not self.seconds > 0:
            return ""
        text = f"{self.tokens / self.seconds:,.0f} tokens/s"
        return text if self.peak is None else f"{text}, {self.flops / self.seconds / self.peak:.0%} of peak"


def smooth(average: float, value: float) -> float:
    return value if math.isnan(average) else 0.95 * average + 0.05 * value
