"""Checkpoints of a run: everything from which it goes on exactly, written while it trains.

RUN/checkpoints/STEP/
    model/         `jaxmodels.load` reads it
    state/         Orbax: optimizer and random key, by path
    losses.npy     float32 [STEP], nats per token
    complete.json  {"format": 2, "step": …, "data": {…}, "files": {path: bytes}}; written last

A folder without complete.json is one that a killed run left: the next run removes it. One whose files are not as long
as complete.json says, or cannot be read, is damaged: it is passed over, with a warning, for the one before it, and set
aside as STEP.damaged. RUN/.lock is held while a run goes on, so that no other goes on with it at the same time.
"""

import contextlib
import dataclasses
import json
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

import jaxmodels
from jaxmodels.io.atomic import atomic_file, flush
from jaxmodels.io.checkpoint import read_arrays, read_config
from jaxmodels.models import describe, model_class
from jaxmodels.sharding import placement
from jaxmodels.training.distributed import agree, is_first
from jaxmodels.training.step import Program, State

FORMAT = 2
MARK = "complete.json"
LOCK = ".lock"


@dataclasses.dataclass
class Position:
    """Where a run stands. `losses` has one number per step taken; `data` is the state of the iterator of batches."""

    state: State
    data: dict[str, Any]
    losses: list[float] = dataclasses.field(default_factory=list)

    @property
    def step(self) -> int:
        return len(self.losses)


class Checkpoints:
    """The checkpoints of one run, one being written at a time, in a thread; all processes call everything together.

    The last `keep` stay, and each whose step is a multiple of keep_every. Raises ValueError where somebody else is
    writing to the run.
    """

    def __init__(self, run: Path, program: Program, keep: int, keep_every: int | None = None):
        self.folder, self.program = run / "checkpoints", program
        self.keep, self.keep_every = keep, keep_every
        self.writing: threading.Thread | None = None
        self.error: BaseException | None = None
        self.lock = filelock.FileLock(run / LOCK, timeout=0, fallback_to_soft=False)
        if is_first():
            run.mkdir(parents=True, exist_ok=True)
            try:
                self.lock.acquire()
            except filelock.Timeout:
                raise ValueError(f"{run} is in use: another process is training there") from None
            except (OSError, NotImplementedError):
                pass  # a file system without locks: nobody can be kept out
            for left in self.folder.glob("*"):
                if left.name.isdecimal() and not (left / MARK).exists():
                    shutil.rmtree(left)
        agree(False)  # nobody reads or writes before that is done

    def save(self, position: Position) -> None:
        """Starts writing; waits only for the one before. The arrays may be used up as soon as this returns."""
        self.wait()
        folder = (self.folder / str(position.step)).absolute()
        if problem(folder) is None:
            return
        if is_first():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        agree(False)
        state = position.state
        parts = [
            ocp.save_async(folder / "model" / "params", {**state.params, **state.fixed}),
            ocp.save_async(folder / "state", beside_the_model(state)),
        ]
        losses, about = np.asarray(position.losses, np.float32), {"step": position.step, "data": position.data}
        self.writing = threading.Thread(target=self.finish, args=(folder, parts, losses, about))
        self.writing.start()

    def finish(self, folder: Path, parts: list[Any], losses: np.ndarray, about: dict[str, Any]) -> None:
        try:
            for part in parts:
                part.result()
            if is_first():
                (folder / "model" / "config.json").write_text(describe(self.program.abstract), encoding="utf-8")
                np.save(folder / "losses.npy", losses)
                files = {str(file.relative_to(folder)): flushed(file) for file in all_files(folder)}
                with atomic_file(folder / MARK) as beside:
                    beside.write_text(json.dumps({"format": FORMAT, **about, "files": files}), encoding="utf-8")
                self.remove_old(about["step"])
        except BaseException as error:
            self.error = error

    def wait(self) -> None:
        """Returns when what is being written is complete; raises what went wrong."""
        if self.writing is not None:
            self.writing.join()
            self.writing = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def close(self) -> None:
        """`wait`, and lets others write to the run."""
        try:
            self.wait()
        finally:
            self.lock.release()

    def remove_old(self, last: int) -> None:
        for step in [step for step in steps(self.folder) if step <= last][: -self.keep]:
            if not self.keep_every or step % self.keep_every:
                (self.folder / str(step) / MARK).unlink()  # first: what is half removed is no checkpoint
                shutil.rmtree(self.folder / str(step))

    def restore(self) -> Position | None:
        """The latest position that is whole, placed as the program says; None where none was ever written.

        A damaged checkpoint is passed over with a warning. Raises ValueError where all of them are damaged, or hold
        another model or optimizer.
        """
        found = steps(self.folder)
        passed_over: list[int] = []
        for step in reversed(found):
            folder = self.folder / str(step)
            wrong = problem(folder)
            if not agree(wrong is not None):  # all of them read it, or none begins to
                try:
                    position = self.read(folder)
                except ValueError as error:
                    wrong = str(error)
                if not agree(wrong is not None):
                    self.set_aside(passed_over)
                    return position
            wrong = wrong or "another process cannot read it"
            print(f"warning: checkpoint {step} is passed over: {wrong}", file=sys.stderr, flush=True)
            passed_over.append(step)
        if found:
            raise ValueError(f"{self.folder} has no checkpoint that can be read: {wrong}")
        return None

    def set_aside(self, damaged: list[int]) -> None:
        """What was passed over is kept for whoever wants to look at it, and in nobody's way."""
        for step in damaged if is_first() else ():
            aside = self.folder / f"{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            with contextlib.suppress(OSError):  # a mounted bucket may not rename folders: then it is written over
                (self.folder / str(step)).rename(aside)

    def read(self, folder: Path) -> Position:
        """What is in a checkpoint that `problem` finds whole; raises ValueError where it can't be read."""
        about = json.loads((folder / MARK).read_text(encoding="utf-8"))
        abstract = self.program.abstract_state()
        model = {**abstract.params, **abstract.fixed}
        arrays = read_arrays(folder / "model" / "params", {name: (a.shape, a.sharding) for name, a in model.items()})
        shapes, places = jax.eval_shape(beside_the_model, abstract), jax.tree.map(lambda a: a.sharding, abstract)
        names = ["key", *optimizer_names(abstract)]
        targets = dict(zip(names, [places.key, *jax.tree.leaves(places.optimizer)], strict=True))
        kept = read_arrays(folder / "state", {name: (shapes[name].shape, place) for name, place in targets.items()})
        key, *optimizer = (kept[name] for name in names)
        state = State(
            step=jax.device_put(np.int32(about["step"]), places.step),
            key=jax.random.wrap_key_data(key),
            params={name: arrays[name] for name in abstract.params},
            fixed={name: arrays[name] for name in abstract.fixed},
            optimizer=jax.tree.unflatten(jax.tree.structure(abstract.optimizer), optimizer),
        )
        return Position(state, about["data"], np.load(folder / "losses.npy").tolist())


def beside_the_model(state: State) -> dict[str, jax.Array]:
    """The arrays of a state that are not the model's, by name: the key and the optimizer's."""
    optimizer = dict(zip(optimizer_names(state), jax.tree.leaves(state.optimizer), strict=True))
    return {"key": jax.random.key_data(state.key), **optimizer}


def optimizer_names(state: State) -> list[str]:
    """The paths of the optimizer's arrays, in the order of its leaves."""
    return [
        "optimizer" + jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.optimizer)
    ]


def steps(folder: Path) -> list[int]:
    """The steps whose checkpoints were finished, first to last."""
    return sorted(int(mark.parent.name) for mark in folder.glob(f"*/{MARK}") if mark.parent.name.isdecimal())


def all_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def problem(folder: Path) -> str | None:
    """Why a checkpoint is not whole, or None where each of its files is there and as long as it was."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        if mark["format"] != FORMAT:
            return f"{folder / MARK} has format {mark['format']}, this version reads {FORMAT}"
        for name, size in mark["files"].items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{folder / name} has {found} bytes of {size}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder} is not complete: {error}"
    return None


def flushed(file: Path) -> int:
    """The size of a file that is on the disk, whenever the machine stops."""
    flush(file)
    return file.stat().st_size


def latest_model(run: Path, mesh: Mesh | None = None) -> tuple[Any, int]:
    """The model of a run's last whole checkpoint, on a mesh or one device, and its step; ValueError where none is."""
    for step in reversed(steps(run / "checkpoints")):
        folder = run / "checkpoints" / str(step)
        wrong = problem(folder)
        if wrong is None:
            return open_model(folder / "model", mesh), step
        print(f"warning: checkpoint {step} is passed over: {wrong}", file=sys.stderr, flush=True)
    raise ValueError(f"{run} holds no whole checkpoint of a training run")


def open_model(folder: Path, mesh: Mesh | None = None) -> Any:
    """`jaxmodels.load`, each device of a mesh reading its part; raises ValueError where it does not fit the mesh."""
    if mesh is None or mesh.size == 1:
        return jaxmodels.load(folder)
    return jaxmodels.load(folder, shardings=placement(model_class(read_config(folder)[0]), mesh))
