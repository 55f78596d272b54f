"""metrics.jsonl of a run: a line per step, {"step": 7, "loss": …, "grad_norm": …, "seconds": …}, and one per
evaluation, {"step": 500, "validation_loss": …}. Losses are in nats per token.
"""

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmodels.io.atomic import atomic_file
from jaxmodels.io.bounded import open_regular
from jaxmodels.io.steps import check_run
from jaxmodels.process.failures import cause
from jaxmodels.process.streams import warn
from jaxmodels.process.texts import quoted

FILE = "metrics.jsonl"
LOSSES = ("loss", "validation_loss")
LARGEST = 2**30  # bytes of metrics.jsonl: ten million steps
LARGEST_LOSS = 3.4028235e38  # that float32 has; matplotlib computes with larger ones, and fails
MOST_UNREADABLE = 1000  # lines, of which a kill leaves one
LEAST, LINE = 2**24, 2**16  # bytes of metrics.jsonl that a run of any length may have, and of a line


def read(run: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's metrics.jsonl; raises ValueError as `each`."""
    return list(each(run))


def each(run: Path, limit: int = LARGEST) -> Iterator[dict[str, Any]]:
    """Lines of a run's metrics.jsonl, one at a time, except those truncated by a kill.

    limit: in bytes. Raises ValueError, naming the file, if it is missing or larger, if a line is not an object with a
    step, numbers as losses and no lists or objects, or if more lines are truncated than kills may leave.
    """
    check_run(run)
    try:
        opened = open_regular(run / FILE)
    except (OSError, ValueError) as error:
        raise ValueError(f"{run} holds no {FILE}: {error}") from None
    with opened:
        if (size := os.fstat(opened.fileno()).st_size) > limit:
            raise ValueError(f"{run / FILE} has {size:,} bytes; at most {limit:,} are read")
        unreadable = 0
        for number in itertools.count(1):
            if unreadable > MOST_UNREADABLE:
                raise ValueError(f"{run / FILE} has more than {MOST_UNREADABLE:,} lines that are not JSON")
            line = opened.readline(LINE + 1)
            if not line:
                return
            if len(line) > LINE:
                if not any(
                    block.strip(b"\0") for block in itertools.chain([line], iter(lambda: opened.read(LINE), b""))
                ):
                    return  # zeros, as a file system leaves them when the machine stops
                raise ValueError(f"{run / FILE}, line {number}, has more than {LINE:,} bytes")
            try:
                content = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                raise ValueError(f"{run / FILE}, line {number}, is not UTF-8") from None
            except (ValueError, RecursionError):  # ValueError: not JSON, or an integer of thousands of digits
                unreadable += 1
                continue
            if not is_line(content):
                found = quoted(content)
                raise ValueError(f"{run / FILE}, line {number}, is {found}; expected an object with a step and numbers")
            yield content


def limit_of(steps: int) -> int:
    """Bytes that metrics.jsonl of a run of some steps may have."""
    return min(LARGEST, LEAST + LINE * steps)


def is_line(content: Any) -> bool:
    """True for an object with a step, and with numbers as losses; null, NaN and infinities are read too.

    False if a value is a list or an object, of which a run writes none: each of its empty lists would take 56 bytes.
    """
    if not isinstance(content, dict) or type(content.get("step")) is not int or not 0 <= content["step"] < 2**63:
        return False
    if any(isinstance(value, list | dict) for value in content.values()):
        return False
    losses = [content[name] for name in LOSSES if name in content]
    numbers = [loss for loss in losses if loss is not None]
    return all(type(loss) in (int, float) and not LARGEST_LOSS < abs(loss) < math.inf for loss in numbers)


def as_line(values: Mapping[str, Any]) -> str:
    """A line of metrics.jsonl. Numbers that are not finite, which JSON lacks, become null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


class Log:
    """metrics.jsonl of a run that has taken len(losses) steps, as a tracker; drops lines of later steps.

    The last step may be evaluated again: its evaluation is kept until the new one is in the file. If the disk is full,
    lines wait in memory until they can be written.
    """

    every = 1

    def __init__(self, run: Path, losses: Sequence[float]):
        run.mkdir(parents=True, exist_ok=True)
        self.run, self.path, self.losses = run, run / FILE, tuple(losses)
        self.rewrite()
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close())
        self.waiting, self.warned = b"", False

    def rewrite(self) -> None:
        """Replace the file by the lines to keep."""
        kept = self.lines_until(self.run, self.losses)
        with atomic_file(self.path) as new:
            new.write_text("".join(kept), encoding="utf-8")

    @staticmethod
    def lines_until(run: Path, losses: Sequence[float]) -> list[str]:
        """Lines to keep: one per step taken, and the last evaluation of each of them.

        They are kept as texts: as objects they would take several times the size of the file. Raises ValueError as
        `each`.
        """
        steps: dict[int, str] = {}
        evaluations: dict[int, str] = {}
        for line in each(run, limit_of(len(losses))) if (run / FILE).exists() else ():
            step = line["step"]
            if "loss" in line:
                steps |= {step: as_line({**line, "loss": losses[step - 1]})} if 0 < step <= len(losses) else {}
            elif step <= len(losses):
                evaluations[step] = as_line(line)
        kept = [evaluations[0]] if 0 in evaluations else []
        for step, loss in enumerate(losses, start=1):
            kept.append(steps.get(step) or as_line({"step": step, "loss": loss}))
            kept += [evaluations[step]] if step in evaluations else []
        return kept

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write a line."""
        self.waiting += as_line({"step": step, **values}).encode()
        self.write_waiting()
        if step == len(self.losses) and "loss" not in values and not self.waiting:
            self.drop_replaced()

    def drop_replaced(self) -> None:
        """Drop an earlier evaluation of the step that was evaluated again; if that fails, the next `Log` does it."""
        try:
            self.rewrite()
        except (OSError, ValueError):  # such as of a full disk: the file is as it was, with both
            return
        self.file.close()
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close())

    def write_waiting(self) -> None:
        """Write the lines that wait, whole lines only; warns once if that fails."""
        size = os.fstat(self.file.fileno()).st_size
        try:
            written = self.file.write(self.waiting)
            if written == len(self.waiting):
                self.waiting = b""
                return
            reason = f"{self.path}: only part of a line could be written"
        except OSError as error:
            reason = cause(error, self.path)
        os.ftruncate(self.file.fileno(), size)
        if not self.warned:
            self.warned = True
            warn(f"{reason}; lines wait in memory")

    def close(self) -> None:
        if self.waiting:
            self.warned = True
            self.write_waiting()
        self.file.close()
        if self.waiting:
            warn(f"{self.path} lacks the last {self.waiting.count(chr(10).encode())} lines")
