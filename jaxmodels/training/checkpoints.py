"""Checkpoints of a training run: asynchronous writes, exact resumption.

RUN/checkpoints/STEP/
    model/         readable by `jaxmodels.load`
    state/         Orbax: optimizer state and random key, by path
    losses.npy     float32 [STEP], nats per token
    complete.json  written last: see `jaxmodels.io.steps`

A folder without complete.json was left by a killed run and is removed by the next one. A checkpoint whose files cannot
be read, or whose sizes differ from complete.json, is damaged: `restore` skips it with a warning, continues from the one
before, and renames it to STEP.damaged. RUN/.lock is held while a run trains, so that no other process trains there.
A folder is removed only if it holds nothing but what this program wrote; symbolic links are refused.
"""

import contextlib
import dataclasses
import itertools
import json
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import filelock
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

import jaxmodels
from jaxmodels.io import manifest
from jaxmodels.io import steps as stored
from jaxmodels.io.atomic import atomic_file, flush
from jaxmodels.io.bounded import open_in_place
from jaxmodels.io.checkpoint import drop_reports_of_saving, read_arrays, read_config, saving
from jaxmodels.io.steps import FORMAT, MARK, check_run, latest_step, problem, read_mark, steps
from jaxmodels.models import describe, names
from jaxmodels.process.distributed import agree, is_first
from jaxmodels.process.failures import cause, naming
from jaxmodels.process.paths import below, resolved
from jaxmodels.process.streams import warn
from jaxmodels.training.runs.agreement import Expected, read_losses
from jaxmodels.training.step import Program, State

LOCK = ".lock"


class UnknownModel(ValueError):
    """A checkpoint's model is of a class that is not registered."""


@dataclasses.dataclass
class Position:
    """Progress of a run. `losses` has one number per step taken; `data` is the state of the iterator of batches."""

    state: State
    data: dict[str, Any]
    losses: list[float] = dataclasses.field(default_factory=list)

    @property
    def step(self) -> int:
        return len(self.losses)


class Checkpoints:
    """Checkpoints of one run. All processes call every method together; one thread writes one checkpoint at a time.

    Keeps the last `keep` checkpoints and those whose step is a multiple of keep_every. Raises ValueError if another
    process is training in the run, if a file of it is a symbolic link, or if a step is neither a checkpoint nor a part
    of one.
    """

    def __init__(
        self,
        run: Path,
        program: Program,
        keep: int,
        keep_every: int | None = None,
        expected: Expected = Expected(),  # noqa: B008 (it is frozen)
    ):
        self.folder, self.program, self.expected = run / "checkpoints", program, expected
        self.keep, self.keep_every = keep, keep_every
        self.writing: threading.Thread | None = None
        self.step, self.begun = 0, False  # of the last checkpoint that was begun; until it is known to be complete
        self.error: BaseException | None = None
        self.unread: set[int] = set()  # steps of complete checkpoints that could not be read
        self.retrying = False  # the last checkpoint could not be written
        self.accepted, self.discarded = threading.Event(), False
        self.finite: Callable[..., Any] | None = None
        drop_reports_of_saving()
        self.lock = filelock.FileLock(run / LOCK, timeout=0, fallback_to_soft=False)
        check_run(run)
        if is_first():
            run.mkdir(parents=True, exist_ok=True)
            if (run / LOCK).exists() and not (run / LOCK).is_file():
                raise ValueError(f"{run / LOCK} is no regular file, which no process could lock")
            try:
                open_in_place(run / LOCK).close()  # raises for a hard link: locking truncates the file
                self.lock.acquire()
            except filelock.Timeout:
                raise ValueError(f"{run} is in use: another process is training there") from None
            except (OSError, NotImplementedError):
                pass  # a file system without locks cannot exclude anyone
            left = stored.unfinished(self.folder)
            if left and not steps(self.folder):
                found = f"{len(left)} unfinished up to step {left[-1]} are removed"
                warn(f"{self.folder} has no complete checkpoint; {found}, and training begins at step 0")
            for step in left:
                stored.remove(self.folder / str(step))
        agree(False)  # a barrier: no process reads or writes before the folder is clean

    def save(self, position: Position) -> None:
        """Start writing, after the previous checkpoint is complete. The arrays may be donated once this returns.

        If the previous one could not be written, this one replaces it; raises OSError if two in a row could not. An
        error of this one sets `failed`.
        """
        self.settle()
        folder = resolved(self.folder) / str(position.step)  # Orbax makes another one of `..` behind a link
        if problem(folder) is None and position.step not in self.unread:
            return
        self.unread.discard(position.step)
        self.step, self.begun = position.step, True
        state, parts = position.state, []
        try:
            if is_first():
                if folder.exists():
                    stored.remove(folder)
                stored.begin(folder)
        except (OSError, ValueError) as error:
            self.error = error
        if agree(self.error is not None):
            self.error = self.error or OSError(f"{folder}: another process could not write it")
            return
        try:
            with saving():
                parts.append(ocp.save_async(folder / "model" / "params", {**state.params, **state.fixed}))
                parts.append(ocp.save_async(folder / "state", training_arrays(state)))
        except Exception as error:  # Orbax raises many kinds
            self.error = error
        losses, about = np.asarray(position.losses, np.float32), {"step": position.step, "data": position.data}
        about |= {"config": self.expected.hyperparameters} if self.expected.hyperparameters else {}
        self.accepted.clear()
        self.writing = threading.Thread(target=self.complete, args=(folder, parts, losses, about))
        self.writing.start()

    def complete(self, folder: Path, parts: list[Any], losses: np.ndarray, about: dict[str, Any]) -> None:
        """Wait for Orbax and complete the checkpoint; runs in the writing thread."""
        for part in parts:
            try:
                part.result()
            except BaseException as error:
                self.error = self.error or error
        try:
            if self.error is not None:
                if is_first():
                    with contextlib.suppress(OSError, ValueError):
                        stored.clear(folder)  # it may have filled the disk
            elif is_first():
                described = describe(self.program.abstract)
                with naming(folder / "model" / "config.json") as file:
                    file.write_text(described, encoding="utf-8")
                with naming(folder / "losses.npy") as file:
                    np.save(file, losses)
                files = {str(file.relative_to(folder)): flushed_size(file) for file in all_files(folder)}
                with atomic_file(folder / MARK) as new:
                    mark = {"format": FORMAT, **about, "model": json.loads(described), "files": files}
                    new.write_text(json.dumps(mark), encoding="utf-8")
                self.accepted.wait()
                if not self.discarded:
                    self.remove_old(about["step"])
        except BaseException as error:
            self.error = error

    @property
    def failed(self) -> bool:
        """True if a checkpoint could not be written, as far as this process knows; `save` writes another."""
        return self.error is not None

    def accept(self) -> None:
        """Let the last checkpoint replace older ones: its validation loss is finite."""
        self.accepted.set()

    def discard(self, step: int) -> None:
        """Delete a checkpoint whose validation loss is not finite. Older ones have been kept."""
        self.discarded = True
        try:
            self.join()
            if is_first() and (self.folder / str(step)).exists():
                stored.remove(self.folder / str(step))
        finally:
            self.discarded = False

    def join(self) -> BaseException | None:
        """Wait for the writing thread; returns its error."""
        self.accepted.set()
        if self.writing is not None:
            self.writing.join()
            self.writing = None
        error, self.error = self.error, None
        return error

    def settle(self) -> None:
        """Wait until the last checkpoint is complete. Prints a warning if it could not be written.

        Raises OSError if the one before could not be written either.
        """
        begun, self.begun = self.begun, False
        error = self.join()
        if not begun:
            return
        if not agree(error is not None):
            self.retrying = False
            return
        reason = self.reason(error) if error is not None else "another process could not write its part"
        if self.retrying:
            raise OSError(f"checkpoint {self.step} could not be saved either: {reason}")
        self.retrying = True
        warn(f"checkpoint {self.step} could not be saved: {reason}; trying again")

    def reason(self, error: BaseException) -> str:
        """Why the last checkpoint could not be written, with the file."""
        return cause(error, resolved(self.folder) / str(self.step))

    def finish(self, position: Position) -> None:
        """Wait until the last checkpoint is complete, or write this one if it could not be; raises like `settle`."""
        self.settle()
        if self.retrying:
            self.save(position)
            self.settle()

    def close(self) -> None:
        """Wait for the current write, then release the run's lock. Prints a warning if the write fails."""
        try:
            error = self.join()
            if error is not None:
                warn(f"checkpoint {self.step} could not be saved: {self.reason(error)}")
        finally:
            self.lock.release()

    def not_finite(self, state: State) -> str:
        """Names of the first arrays of a state that have a NaN or an infinity; "" if there are none."""
        if self.finite is None:
            self.finite = lower_finite(self.program).compile()
        flags = np.asarray(self.finite(state))
        wrong = [name for name, finite in zip(inexact_names(state), flags, strict=True) if not finite]
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        return ", ".join(wrong[:3]) + more

    def remove_old(self, last: int) -> None:
        """Remove all steps up to the last one but the latest `keep` complete ones, and those of `keep_every`."""
        found = [step for step in steps(self.folder) if step <= last]
        whole = [step for step in found if step == last or problem(self.folder / str(step)) is None]
        for step in found:
            if step not in whole[-self.keep :] and (not self.keep_every or step % self.keep_every):
                try:
                    stored.remove(self.folder / str(step))
                except (OSError, ValueError) as error:  # such as of a file that another machine has open
                    warn(str(error))

    def restore(self) -> Position | None:
        """Read the latest complete checkpoint, sharded as the program requires; None if there is none.

        Skips a damaged checkpoint with a warning. Raises ValueError if all of them are damaged, or if they hold another
        model or optimizer.
        """
        found = steps(self.folder)
        skipped: dict[int, str] = {}
        for step in reversed(found):
            folder = self.folder / str(step)
            wrong = problem(folder)
            if not agree(wrong is not None):  # either all processes read it, or none
                try:
                    position = self.read(folder)
                    names = self.not_finite(position.state)
                    wrong = f"{folder} has values that are not finite: {names}" if names else None
                except ValueError as error:
                    wrong = str(error)
                if not agree(wrong is not None):
                    self.set_aside(skipped)
                    return position
            skipped[step] = wrong or "another process cannot read it"
        if found:
            raise ValueError(f"{self.folder} has no checkpoint that can be read: {'; '.join(skipped.values())}")
        return None

    def set_aside(self, damaged: Mapping[int, str]) -> None:
        """Warn of damaged checkpoints, and rename them, so that they can be inspected and are not read again.

        Those that cannot be renamed are written again at their step.
        """
        self.unread = set(damaged)
        for step, reason in damaged.items():
            warn_skipped(step, reason)
        for step in damaged if is_first() else ():
            names = (f"{step}.damaged{number or ''}" for number in itertools.count())
            aside = next(self.folder / name for name in names if not (self.folder / name).exists())
            with contextlib.suppress(OSError):  # mounted buckets may not rename folders
                (self.folder / str(step)).rename(aside)

    def read(self, folder: Path, expected: Expected | None = None, later: int = 0) -> Position:
        """Read a checkpoint without a `problem`; raises ValueError if its content cannot be read or is not expected.

        expected: of the run that the checkpoint is of, if it is another one. later: how many places later the parts of
        that run's optimizer are than those of this one's: 1 if that one alone clips gradients, -1 if this one does.
        """
        about, expected = read_mark(folder), expected or self.expected
        expected.check(folder, about)
        losses = read_losses(folder / "losses.npy", about["step"])
        abstract = self.program.abstract_state()
        model = {**abstract.params, **abstract.fixed}
        wanted = {name: typed(array, array.sharding) for name, array in model.items()}
        arrays = read_arrays(folder / "model" / "params", wanted, exact=True)
        shapes, places = jax.eval_shape(training_arrays, abstract), jax.tree.map(lambda a: a.sharding, abstract)
        own = ["key", *optimizer_names(abstract)]
        stored = [moved(name, later) for name in own]
        targets = zip(own, stored, [places.key, *jax.tree.leaves(places.optimizer)], strict=True)
        wanted = {theirs: typed(shapes[ours], place) for ours, theirs, place in targets}
        kept = read_arrays(folder / "state", wanted, exact=True, zeros=True)  # moments are zeros at first
        expected.check_counts(folder, kept, about["step"])
        key, *optimizer = (kept[name] for name in stored)
        state = State(
            step=jax.device_put(np.int32(about["step"]), places.step),
            key=jax.random.wrap_key_data(key),
            params={name: arrays[name] for name in abstract.params},
            fixed={name: arrays[name] for name in abstract.fixed},
            optimizer=jax.tree.unflatten(jax.tree.structure(abstract.optimizer), optimizer),
        )
        return Position(state, about["data"], losses.tolist())


def typed(array: Any, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, with a place."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)


def training_arrays(state: State) -> dict[str, jax.Array]:
    """Arrays of a state that are not the model's, by name: the random key and the optimizer state."""
    optimizer = dict(zip(optimizer_names(state), jax.tree.leaves(state.optimizer), strict=True))
    return {"key": jax.random.key_data(state.key), **optimizer}


def optimizer_names(state: State) -> list[str]:
    """Paths of the optimizer's arrays, in the order of its leaves."""
    return [
        "optimizer" + jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.optimizer)
    ]


def moved(name: str, by: int) -> str:
    """Name of an optimizer's array if the parts of the optimizer come so many places later."""
    return re.sub(r"\[(\d+)\]", lambda part: f"[{int(part[1]) + by}]", name, count=1)


def all_files(folder: Path) -> list[Path]:
    return sorted(file for file in below(folder) if file.is_file() and file != folder / manifest.NAME)


def flushed_size(file: Path) -> int:
    """Flush a file to disk and return its size."""
    flush(file)
    return file.stat().st_size


def inexact_names(state: State) -> list[str]:
    """Names of a state's floating-point arrays: the model's by path, the optimizer's as in checkpoints."""
    named = {**state.params, **state.fixed, **training_arrays(state)}
    return sorted(name for name, array in named.items() if jnp.issubdtype(array.dtype, jnp.inexact))


def lower_finite(program: Program) -> jax.stages.Lowered:
    """Trace the check of `inexact_names`: State -> bool [n], True for an array that is finite."""

    def finite(state: State) -> jax.Array:
        named = {**state.params, **state.fixed, **training_arrays(state)}
        return jnp.stack([jnp.isfinite(named[name]).all() for name in inexact_names(state)])

    replicated = NamedSharding(program.mesh, PartitionSpec())
    return jax.jit(finite, out_shardings=replicated).lower(program.abstract_state())


def warn_skipped(step: int, reason: str) -> None:
    warn(f"checkpoint {step} is skipped: {reason}")


def latest_model(run: Path, mesh: Mesh | None = None) -> tuple[Any, int]:
    """Load the model of a run's latest complete checkpoint, on a mesh or one device; returns it and its step.

    Raises ValueError if there is none, and UnknownModel if its class is not registered.
    """
    folder, skipped = latest_step(run)
    for step, reason in skipped.items():
        warn_skipped(step, reason)
    return open_model(folder / "model", mesh), int(folder.name)


def open_model(folder: Path, mesh: Mesh | None = None) -> Any:
    """Load a model; on a mesh, each device reads its own part. Raises ValueError if the model does not fit the mesh.

    On a mesh, a model with a list of layers (`stacked` is false in its config) is loaded to one device and stacked.
    """
    name, config = read_config(folder)
    if name not in names():
        raise UnknownModel(f"model={name!r} is not registered")
    if mesh is None or mesh.size == 1:
        return jaxmodels.load(folder)
    if config.get("stacked") is False:
        return jaxmodels.load(folder).stacked()
    return jaxmodels.load(folder, shardings=mesh)
