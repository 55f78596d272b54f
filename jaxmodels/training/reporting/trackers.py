"""Receivers of a run's numbers, all through one interface: TensorBoard, Weights & Biases, functions.

metrics.jsonl, `jaxmodels.training.metrics.Log`, is one of them.
"""

import contextlib
import hashlib
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxmodels.process.extras import require
from jaxmodels.process.failures import cause, naming
from jaxmodels.process.streams import warn

FLUSH_SECONDS = 10.0
Callback = Callable[[int, Mapping[str, float]], None]


class Tracker(Protocol):
    """Receiver of a run's numbers. Only the first process of a run has any.

    Each step has loss, grad_norm and seconds; each validation has validation_loss, and what the experiment's `report`
    adds. every: a step's numbers are written if the step is a multiple of this.
    """

    every: int

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Receive the numbers of a step or of a validation."""

    def close(self) -> None:
        """Called once, when the run ends."""


class Trackers:
    """Several trackers. One whose files cannot be written is dropped with a warning; the run goes on."""

    def __init__(self, trackers: Sequence[Tracker], run: Path):
        self.trackers, self.run = list(trackers), run

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a step."""
        for tracker in list(self.trackers):
            if step % tracker.every == 0:
                self.attempt(tracker, step, values)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a validation."""
        for tracker in list(self.trackers):
            self.attempt(tracker, step, values)

    def attempt(self, tracker: Tracker, step: int, values: Mapping[str, float]) -> None:
        try:
            tracker.write(step, values)
        except OSError as error:
            self.trackers.remove(tracker)
            warn(f"{type(tracker).__name__} receives nothing from step {step} on: {cause(error, self.run)}")
            with contextlib.suppress(OSError):
                tracker.close()

    def close(self) -> None:
        for tracker in self.trackers:
            try:
                tracker.close()
            except OSError as error:
                warn(f"{type(tracker).__name__} is not complete: {cause(error, self.run)}")


class Function:
    """Tracker that calls a function, such as a notebook's, with each step and validation."""

    every = 1

    def __init__(self, function: Callback):
        self.function = function

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.function(step, values)

    def close(self) -> None:
        pass


class TensorBoard:
    """Event files in RUN/tensorboard of a run that has taken `steps` steps; later ones in older files are hidden.

    They are written at once, unlike by tensorboardX's SummaryWriter, whose thread would end, and block, at a full disk.
    """

    every = 10  # each number takes 50 bytes

    def __init__(self, run: Path, steps: int):
        require("train", "tensorboardX")
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        (run / "tensorboard").mkdir(parents=True, exist_ok=True)
        # Its own name has the second: another file of the same second would be replaced.
        writer = EventsWriter(str(run / "tensorboard" / "events"), f".{uuid.uuid4().hex[:8]}")
        self.writer, self.event, self.scalar = writer, event_pb2, scalar
        self.records = self.writer._py_recordio_writer
        self.file = Path(self.records.path)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        with naming(self.file):
            self.writer.write_event(event_pb2.Event(wall_time=time.time(), step=steps + 1, session_log=start))
        self.flushed = time.monotonic()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = time.time()
        with naming(self.file):
            for name, value in values.items():
                summary = self.scalar(name, value)
                self.writer.write_event(self.event.Event(wall_time=now, step=step, summary=summary))
            if time.monotonic() - self.flushed > FLUSH_SECONDS:
                self.writer.flush()
                self.flushed = time.monotonic()

    def close(self) -> None:
        with naming(self.file):
            try:
                self.writer.close()
            finally:
                self.records.close()  # not closed, if it cannot be flushed


class WandB:
    """Run of a project of Weights & Biases, with the run's hyperparameters; a resumed run continues it."""

    every = 10

    def __init__(self, run: Path, project: str, config: Mapping[str, Any]):
        require("wandb", "wandb")
        import wandb

        identity = hashlib.sha256(str(run.absolute()).encode()).hexdigest()[:16]
        self.run = wandb.init(
            project=project, name=run.name, id=identity, resume="allow", dir=str(run), config=dict(config)
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()
