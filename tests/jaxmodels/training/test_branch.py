"""Runs that diverge keep their last good checkpoint, from which a new run goes on with other hyperparameters."""

import dataclasses
import json
import math
import re
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import optax
import pytest
from flax import nnx

import jaxmodels
from jaxmodels.io.checkpoint import stored_types
from jaxmodels.io.steps import steps
from jaxmodels.layers import Dropout, Embed
from jaxmodels.training import metrics, trainer
from jaxmodels.training.checkpoints import Checkpoints, Position, moved, optimizer_names
from jaxmodels.training.optimizers import OptimizerName, make_optimizer, make_schedule
from jaxmodels.training.runs import folder as run_module
from jaxmodels.training.runs.folder import Branch, check_folder, read_about, write_about
from jaxmodels.training.script import main, parse
from jaxmodels.training.step import State
from tests.train_common import ROOT, TEXT, TINY, Bigrams, at_a_constant_rate, program, start
from train import rope

PROGRAM = "python -m train.rope"


def run_of(folder: Path, *complete: int, **fields: object) -> rope.Rope:
    """A folder of a run with empty checkpoints."""
    experiment = rope.Rope(rope.Config(**fields))
    for step in complete:
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
        mark = {"format": 2, "step": step, "data": {}, "files": {}}
        (folder / "checkpoints" / str(step) / "complete.json").write_text(json.dumps(mark))
    write_about(folder, experiment, "0" * 64, {})
    return experiment


def test_fewer_steps_than_taken_are_refused(tmp_path):
    run_of(tmp_path / "run", 5, 12, steps=20)
    check_folder(rope.Rope(rope.Config(steps=12)), tmp_path / "run")
    with pytest.raises(ValueError, match=r"steps=11 .*12 .*run"):
        check_folder(rope.Rope(rope.Config(steps=11)), tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--branch", "{run}", "--from-step", "7"], "from_step=7: .*5, 12"),
        (["--branch", "{run}", "--steps", "12"], "steps=12 .*from_step=12"),
        (["--branch", "{run}", "--out", "{run}"], "{run} .*--out"),
        (["--branch", "{run}", "--out", "{other}"], "{other} was not branched from {run} at step 12.*--out"),
        (["--branch", "{run}", "--resume", "{run}"], "--resume .*--branch"),
        (["--branch", "{run}/nothing"], "{run}/nothing "),
        (["--from-step", "5"], "--from-step .*--branch"),
        (["--resume", "{run}", "--d-ff", "13"], "d_ff=512, not d_ff=13.*--branch {run}"),
    ],
)
def test_a_branch_that_cannot_begin_is_refused(flags, message, tmp_path):
    names = {"run": tmp_path / "run", "other": tmp_path / "other"}
    run_of(names["run"], 5, 12, steps=20)
    run_of(names["other"], 5, steps=20)
    with pytest.raises(ValueError, match=message.format(**names)):
        main(rope.Rope, PROGRAM, [flag.format(**names) for flag in flags])


def test_advice_can_be_typed_as_it_is_printed(tmp_path):
    run = tmp_path / "a run"
    run_of(run, 5, steps=20)
    with pytest.raises(ValueError, match=re.escape(f"--resume '{run}', ")) as refused:
        check_folder(rope.Rope(rope.Config(d_ff=13)), run)
    assert str(refused.value).endswith(f"--branch '{run}'")
    assert Branch.at(str(run), 5) == Branch(run, 5)  # as `train` says in a notebook


def test_flags_of_a_branch_come_from_its_run(tmp_path):
    run_of(tmp_path / "run", 5, 12, steps=20, d_ff=13)
    for flags, step in (([], 12), (["--from-step", "5"], 5)):
        experiment, command = parse(rope.Rope, PROGRAM, ["--branch", str(tmp_path / "run"), *flags, "--warmup", "3"])
        assert (experiment.config.d_ff, experiment.config.steps, experiment.config.warmup) == (13, 20, 3)
        assert command.run == tmp_path / f"run-from-{step}"
        assert command.origin == Branch(tmp_path / "run", step)
        assert command.origin.changed(experiment) == {"warmup": (500, 3)}


def test_arrays_that_are_not_finite_are_named(tmp_path):
    made = program(optax.adam(0.1))
    checkpoints = Checkpoints(tmp_path / "run", made, keep=1)
    state = made.make_state(0)
    assert checkpoints.not_finite(state) == ""
    (name,) = state.params
    broken = dataclasses.replace(state, params={name: state.params[name].at[1, 2].set(np.nan)})
    assert checkpoints.not_finite(broken) == name
    checkpoints.close()


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / "run", program(optax.adam(0.1)), keep=1)
    yield opened
    opened.close()


def test_only_complete_checkpoints_count_as_kept(checkpoints):
    """Folders that only look like steps would otherwise take the place of the run's own, which are then removed."""
    state, checkpoints.keep = checkpoints.program.make_state(0), 2
    for n in (1, 2, 5):
        checkpoints.save(Position(state, {"next_index": n}, [0.5] * n))
        checkpoints.accept()
    for name in ("03", "3", "4", "05", "005"):
        (checkpoints.folder / name).mkdir()
        (checkpoints.folder / name / "complete.json").write_text("{}")
    checkpoints.settle()
    checkpoints.remove_old(5)
    assert {2, 5} <= set(steps(checkpoints.folder))
    assert 1 not in steps(checkpoints.folder)


def test_older_checkpoints_are_kept_until_a_new_one_is_accepted(checkpoints):
    state = checkpoints.program.make_state(0)

    def save(n: int) -> None:
        checkpoints.save(Position(state, {"next_index": n}, [0.5] * n))

    save(1)
    checkpoints.accept()
    save(2)
    checkpoints.discard(2)
    assert steps(checkpoints.folder) == [1]
    assert not (checkpoints.folder / "2").exists()
    save(3)
    checkpoints.accept()
    checkpoints.settle()
    assert steps(checkpoints.folder) == [3]


def test_metrics_are_json(tmp_path):
    log = metrics.Log(tmp_path, [])
    log.write(3, {"score": math.nan, "other": np.float32(0.5).item(), "large": -math.inf})
    log.close()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {"step": 3, "score": None, "other": 0.5, "large": None}


@pytest.fixture(scope="module")
def new(tmp_path_factory, compile_cache) -> list[str]:
    """Flags of a run."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "sea.txt").write_text(TEXT)
    flags = [*TINY, "--text", folder / "sea.txt", "--no-tensorboard", "--compile-cache", compile_cache]
    return [*map(str, flags)]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics.read(run) if "loss" in line]


@pytest.mark.slow
def test_a_run_that_diverges_keeps_its_last_good_checkpoint_and_says_how_to_go_on(new, tmp_path):
    flags = ["--steps", "19", "--keep", "1"]
    run, begun = tmp_path / "a run", [*at_a_constant_rate(new), *flags]
    assert main(rope.Rope, PROGRAM, [*begun, "--learning-rate", "0.01", "--steps", "5", "--out", str(run)]) == 0
    out = tmp_path / "diverged"
    process = start("train.rope", "--branch", run, *flags[:2], "--learning-rate", "1e30", "--out", out)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert re.fullmatch(rf"python -m train.rope: step \d+: .*python -m train.rope --branch {out} .*\n", err)
    assert steps(out / "checkpoints") == [5]
    assert len(losses(out)) < 19
    # the command that it printed, with another rate and text, in the first run's vocabulary
    (tmp_path / "other.txt").write_text(TEXT.replace("sea", "tea")[:3000])
    command = re.search(r"-m (train.rope --branch .*)\n", err)[1].split()
    changed = [
        "--learning-rate=0.02",
        "--batch-size=6",
        "--text",
        tmp_path / "other.txt",
        "--out",
        tmp_path / "good",
        *flags[:2],
    ]
    process = start(*command, *changed)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "batch_size=6 (before: 4)" in out
    about = read_about(tmp_path / "good")
    assert [(Path(entry["run"]).name, entry["step"]) for entry in about.branches] == [("a run", 5), ("diverged", 5)]
    assert about.branches[1]["changed"]["batch_size"] == [4, 6]
    assert losses(tmp_path / "good")[:5] == losses(run)
    assert len(losses(tmp_path / "good")) == 19
    # it resumes as any other run
    process = start("train.rope", "--resume", tmp_path / "good", "--steps", 23)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert len(losses(tmp_path / "good")) == 23
    assert read_about(tmp_path / "good").branches == about.branches


@pytest.mark.slow
def test_a_branch_without_changes_takes_the_same_steps(new, tmp_path):
    run = tmp_path / "run"
    assert main(rope.Rope, PROGRAM, [*new, "--steps", "12", "--out", str(run)]) == 0
    branch = ["--branch", str(run), "--from-step", "5", "--out", str(tmp_path / "branch"), "--no-tensorboard"]
    assert main(rope.Rope, PROGRAM, branch) == 0
    assert losses(tmp_path / "branch") == losses(run)
    halved = ["--branch", str(run), "--from-step", "10", "--batch-size", "8", "--steps", "11", "--no-tensorboard"]
    assert main(rope.Rope, PROGRAM, halved) == 0
    mark = tmp_path / "run-from-10" / "checkpoints" / "11" / "complete.json"
    assert json.loads(mark.read_text())["data"]["next_index"] == 10 * 4 // 8 + 1


@pytest.mark.slow
@pytest.mark.parametrize("flags", [list, at_a_constant_rate])
def test_a_first_step_that_diverges_saves_nothing(flags, new, tmp_path):
    command = [sys.executable, "-m", "train.rope", *flags(new), "--learning-rate", "1e30", "--steps", "1"]
    done = subprocess.run([*command, "--out", tmp_path / "run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"python -m train.rope: step 1: .*\b(nan|inf)\b.*learning_rate\n", done.stderr)
    assert steps(tmp_path / "run" / "checkpoints") == []


@pytest.mark.parametrize("name", typing.get_args(OptimizerName))
def test_parts_of_an_optimizer_come_one_place_later_if_gradients_are_clipped(name):
    def names(max_norm: float | None) -> list[str]:
        schedule = make_schedule("cosine", 0.1, width=5, warmup=1, steps=9)
        made = make_optimizer(name, schedule, weight_decay=0.1, max_norm=max_norm)
        shapes = {"layers.0.kernel": (3, 5), "generator.kernel": (5, 7), "norm.scale": (3,)}
        arrays = {path: np.ones(shape, np.float32) for path, shape in shapes.items()}
        return optimizer_names(State(0, None, arrays, {}, made.init(arrays)))

    assert [moved(array, 1) for array in names(None)] == names(1.0)
    assert [moved(array, -1) for array in names(1.0)] == names(None)


@pytest.mark.slow
def test_a_branch_begins_and_ends_to_clip_gradients(new, tmp_path):
    run, branch = tmp_path / "run", ["--no-tensorboard", "--branch"]
    assert main(rope.Rope, PROGRAM, [*new, "--steps", "3", "--out", str(run)]) == 0
    assert main(rope.Rope, PROGRAM, [*branch, str(run), "--clip", "None", "--steps", "5"]) == 0
    free = tmp_path / "run-from-3"
    assert main(rope.Rope, PROGRAM, ["--resume", str(free), "--no-tensorboard", "--steps", "6"]) == 0
    assert main(rope.Rope, PROGRAM, [*branch, str(free), "--clip", "0.5", "--steps", "7"]) == 0
    assert losses(tmp_path / "run-from-3-from-6")[:6] == losses(free)
    assert len(losses(tmp_path / "run-from-3-from-6")) == 7


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["write_about", "Branch.copy_metrics", "metrics.each"])
def test_a_branch_that_was_killed_as_it_began_begins_again(new, tmp_path, killed, monkeypatch):
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(rope.Rope, PROGRAM, [*new, "--steps", "3", "--out", str(run)]) == 0
    command = ["--branch", str(run), "--steps", "5", "--no-tensorboard", "--out", str(out)]

    class Killed(BaseException):
        pass

    def kill(*_: object, **__: object) -> None:
        raise Killed

    module = trainer if killed == "write_about" else run_module
    with monkeypatch.context() as patched:
        patched.setattr(f"{module.__name__}.{killed}", kill)
        with pytest.raises(Killed):
            main(rope.Rope, PROGRAM, command)
    assert not steps(out / "checkpoints")
    assert main(rope.Rope, PROGRAM, command) == 0
    assert losses(out)[:3] == losses(run)
    assert len(losses(out)) == 5


class Large(Bigrams):
    """A model of a megabyte, whose moments take kilobytes in files before the first step."""

    def __init__(self, seed: int = 0, *, rngs: nnx.Rngs | None = None):
        self.src_embed = Embed(500, 501, rngs=rngs or nnx.Rngs(seed))
        self.dropout = Dropout(0.3)


def test_moments_of_zeros_are_read_only_with_their_model(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxmodels.io.checkpoint.FREE_BYTES", 0)
    jaxmodels.register("tests.Large")(Large)
    opened = Checkpoints(tmp_path / "run", program(optax.adam(0.1), Large), keep=1)
    opened.save(Position(opened.program.make_state(0), {"next_index": 0}, []))
    opened.settle()
    assert opened.restore().step == 0
    with pytest.raises(ValueError, match=r"state is not a complete Orbax checkpoint: 2,004,0\d\d bytes of arrays in"):
        stored_types(opened.folder / "0" / "state")
    opened.close()
