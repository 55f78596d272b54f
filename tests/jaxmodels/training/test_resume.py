"""Runs that are killed or signaled, as real processes: they resume bit for bit."""

import contextlib
import io
import json
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmodels.io.checkpoint import read_arrays
from jaxmodels.io.steps import steps
from jaxmodels.text import CharVocabulary
from jaxmodels.training import metrics
from jaxmodels.training.checkpoints import typed
from jaxmodels.training.script import main, parse
from jaxmodels.training.tokenize import tokenize
from jaxmodels.training.trainer import Trainer
from tests.train_common import TEXT, TINY, at_a_constant_rate, start
from train import rope

STEPS = 40
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture(scope="module")
def new(tmp_path_factory, compile_cache):
    """Flags of a run with dropout and a checkpoint every 5 steps."""
    file = tmp_path_factory.mktemp("text") / "sea.txt"
    file.write_text(TEXT)
    flags = [*TINY, "--dropout", 0.1, "--text", file, "--steps", STEPS, "--no-tensorboard"]
    return list(map(str, [*flags, "--compile-cache", compile_cache]))


def finish(*arguments: object) -> str:
    """In this process, which compiles as the others do."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(rope.Rope, "python -m train.rope", list(map(str, arguments))) == 0
    return out.getvalue()


def numbers(run: Path) -> dict[str, np.ndarray]:
    """Every number that a run's last checkpoint holds, and its curves."""
    from orbax.checkpoint import v1 as ocp

    folder = run / "checkpoints" / str(steps(run / "checkpoints")[-1])
    arrays: dict[str, object] = {}
    for part in (folder / "model" / "params", folder / "state"):
        stored = ocp.metadata(part).metadata
        arrays |= read_arrays(part, {name: typed(array, DEVICE) for name, array in stored.items()})
    lines = metrics.read(run)
    arrays["curve"] = [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]
    arrays["evaluations"] = [list(line.values()) for line in lines if "validation_loss" in line]
    arrays["losses"] = np.load(folder / "losses.npy")
    arrays["data"] = json.loads((folder / "complete.json").read_text())["data"]["next_index"]
    return {name: np.asarray(array) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def straight(new, tmp_path_factory) -> dict[str, np.ndarray]:
    """Numbers of a run that was not stopped."""
    run = tmp_path_factory.mktemp("straight") / "run"
    finish(*new, "--out", run)
    found = numbers(run)
    assert len(found["curve"]) == STEPS
    assert len(found["evaluations"]) == STEPS / 5
    return found


def assert_same(run: Path, straight: dict[str, np.ndarray]) -> None:
    found = numbers(run)
    assert found.keys() == straight.keys()
    for name, array in straight.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_exactly(new, straight, tmp_path):
    run, rng = tmp_path / "run", np.random.default_rng()
    # as the folder is made, and after so many lines of the curve; and a moment more that is different each time
    for lines in (None, 1, 22):
        process = start("train.rope", *new, "--out", run)
        file = run / "metrics.jsonl"
        while process.poll() is None and not (
            run.exists() if lines is None else file.exists() and file.read_text().count("grad_norm") >= lines
        ):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, err
    finish(*new, "--out", run)
    assert_same(run, straight)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adafactor", "lion", "muon", "adamw"])
def test_the_state_of_every_optimizer_resumes_exactly_after_a_kill(new, tmp_path, optimizer):
    steps_here = ["--steps", 14, "--optimizer", optimizer, "--learning-rate", 0.01]
    large = ["--d-model", 132, "--d-ff", 131]  # matrices whose squares are factored
    flags = [*new, *steps_here, *(large if optimizer == "adafactor" else ["--momentum-dtype", "bfloat16"])]
    finish(*flags, "--out", tmp_path / "straight")
    run = tmp_path / "run"
    process = start("train.rope", *flags, "--out", run)
    while process.poll() is None and not (run / "checkpoints" / "5" / "complete.json").exists():
        time.sleep(0.001)
    process.kill()
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    finish(*flags, "--out", run)
    assert_same(run, numbers(tmp_path / "straight"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "after"),
    [
        (signal.SIGINT, 130, "4-gram (Witten-Bell): validation"),  # before it compiles, or while
        (signal.SIGTERM, 0, "step 5: loss"),  # while it trains, saves, evaluates or samples
    ],
)
def test_a_signal_saves_and_ends_a_run_which_resumes_exactly(new, straight, tmp_path, number, code, after):
    run = tmp_path / "run"
    process = start("train.rope", *new, "--out", run)
    for line in process.stdout:
        if after in line:
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (code, "")
    stopped = int(out.split("stopped at step ")[1].split(";")[0])
    assert steps(run / "checkpoints")[-1:] == ([stopped] if stopped else [])
    assert f": python -m train.rope --resume {run}\n" in out
    if number == signal.SIGTERM:
        finish("--resume", run, *new[-3:])
        assert_same(run, straight)


@pytest.mark.slow
def test_a_signal_does_not_wait_for_the_end_of_an_evaluation(new, tmp_path):
    run, long = tmp_path / "run", tmp_path / "long.txt"
    long.write_text(TEXT * 400)  # thousands of batches to validate
    process = start("train.rope", *new, "--text", long, "--out", run)
    while process.poll() is None and not (run / "checkpoints" / "5" / "complete.json").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    process.terminate()
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert "stopped at step 5;" in out
    assert "step 5: loss" not in out  # what the evaluation would have ended with


@pytest.mark.slow
def test_leftovers_of_a_kill_before_the_configuration_was_written_do_not_matter(new, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").touch()
    (run / ".config.json.4711").write_text("{")
    finish(*new, "--out", run, "--steps", 2)
    assert steps(run / "checkpoints") == [2]


@pytest.mark.slow
def test_a_run_without_checkpoint_may_restart_with_other_hyperparameters(new, tmp_path):
    run = tmp_path / "run"
    constant = at_a_constant_rate(new)
    with pytest.raises(ValueError, match=r"^step \d+: .* not finite"):
        finish(*constant, "--out", run, "--steps", 4, "--learning-rate", "1e30")
    finish(*constant, "--out", run, "--steps", 4, "--learning-rate", "0.01")
    assert steps(run / "checkpoints") == [4]
    with pytest.raises(ValueError, match=r"was trained with learning_rate=0\.01, not "):
        finish(*constant, "--out", run, "--steps", 4, "--learning-rate", "0.1")


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 5])
def test_profiling_does_not_change_saves_and_reports(new, tmp_path, every):
    run = tmp_path / "run"
    out = finish(*new, "--out", run, "--steps", 3, "--every", every, "--profile", 5)
    assert list((run / "profile").rglob("*.xplane.pb"))
    assert steps(run / "checkpoints") == ([1, 2, 3] if every == 1 else [3])
    assert out.count(", validation loss ") == (3 if every == 1 else 1)


@pytest.mark.slow
def test_two_processes_do_not_train_in_one_folder(new, ended, tmp_path):
    run = Path(shutil.copytree(ended, tmp_path / "run"))
    experiment, command = parse(rope.Rope, "train.rope", [*new, "--out", str(run)])
    opened = Trainer(experiment, run, command.options)
    with pytest.raises(ValueError, match=f"{run} is in use"):
        finish(*new, "--out", run)
    opened.close()
    finish(*new, "--out", run)


@pytest.fixture(scope="module")
def ended(new, tmp_path_factory) -> Path:
    """A run that ended early, with checkpoints 5, 10 and 12."""
    run = tmp_path_factory.mktemp("ended") / "run"
    finish(*new, "--out", run, "--steps", 12)
    return run


def damage(file: Path, how: str) -> None:
    match how:
        case "cut":
            file.write_bytes(file.read_bytes()[:-1])
        case "gone":
            file.unlink()
        case "zeros":  # of the same length
            file.write_bytes(bytes(file.stat().st_size))
        case "not finite":
            np.save(file, np.load(file) * np.nan)
        case "no position":
            file.write_text(json.dumps(json.loads(file.read_text()) | {"data": {"next_index": -1}}))


# Orbax leaves tasks behind if one of its files is damaged; the test that runs when they are collected gets a warning.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("state/state/d/*", "cut"),
        ("model/params/state/manifest.ocdbt", "zeros"),
        ("losses.npy", "gone"),
        ("losses.npy", "not finite"),
        ("complete.json", "no position"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(new, ended, tmp_path, capsys, name, how):
    run = Path(shutil.copytree(ended, tmp_path / "run"))
    damage(next((run / "checkpoints" / "12").glob(name)), how)
    (run / "checkpoints" / "99").mkdir()  # what a kill leaves
    experiment, command = parse(rope.Rope, "train.rope", [*new, "--out", str(run)])
    opened = Trainer(experiment, run, command.options)
    opened.close()
    assert "warning: checkpoint 12 is skipped: " in capsys.readouterr().err
    assert opened.position.step == int(opened.position.state.step) == opened.position.data["next_index"] == 10
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"5", "10", "12.damaged"}


@pytest.mark.slow
def test_a_damaged_checkpoint_that_cannot_be_renamed_is_written_again(new, ended, tmp_path, monkeypatch):
    run = Path(shutil.copytree(ended, tmp_path / "run"))
    damage(run / "checkpoints" / "12" / "state" / "state" / "manifest.ocdbt", "zeros")

    rename = Path.rename

    def not_aside(path, target):  # as on a mounted bucket
        if target.name == "12.damaged":
            raise OSError(f"{path} cannot be renamed to {target}")
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", not_aside)
        finish(*new, "--out", run, "--steps", 12)
    experiment, command = parse(rope.Rope, "train.rope", [*new, "--out", str(run)])
    opened = Trainer(experiment, run, command.options)
    opened.close()
    assert opened.position.step == 12


def test_a_run_whose_checkpoints_are_all_damaged_is_an_error_without_warnings(new, ended, tmp_path, capsys):
    run = Path(shutil.copytree(ended, tmp_path / "run"))
    for step in (5, 10, 12):
        damage(run / "checkpoints" / str(step) / "losses.npy", "cut")
    with pytest.raises(ValueError, match=f"{run / 'checkpoints'} has no checkpoint.*/12/.*/10/.*/5/"):
        main(rope.Rope, "train.rope", [*new, "--out", str(run)])
    assert capsys.readouterr().err == ""


def test_a_run_is_resumed_with_its_own_vocabulary_alone(new, ended, tmp_path):
    run, tokens, file = Path(shutil.copytree(ended, tmp_path / "run")), tmp_path / "tokens", tmp_path / "sea.txt"
    file.write_text(TEXT)
    tokenize(str(file), tokens)

    def resume() -> None:
        experiment, command = parse(rope.Rope, "train.rope", [*new, "--text", str(tokens), "--out", str(run)])
        Trainer(experiment, run, command.options).close()

    before = (run / "vocabulary.json").stat()
    resume()
    assert (run / "vocabulary.json").stat().st_ino == before.st_ino  # it was not replaced
    own = (run / "vocabulary.json").read_bytes()
    CharVocabulary(CharVocabulary.of(TEXT).characters[::-1]).save(tokens / "vocabulary.json")
    with pytest.raises(ValueError, match=f"text='{tokens}' has another vocabulary .*{run}/vocabulary.json"):
        resume()
    assert (run / "vocabulary.json").read_bytes() == own


def test_a_lock_that_no_process_could_hold_is_refused(new, ended, tmp_path):
    run = Path(shutil.copytree(ended, tmp_path / "run"))
    (run / ".lock").unlink()
    (run / ".lock").mkdir()
    with pytest.raises(ValueError, match=r"/\.lock is no regular file"):
        main(rope.Rope, "train.rope", [*new, "--out", str(run)])


def test_metrics_that_no_run_writes_are_not_copied_to_a_branch(new, ended, tmp_path):
    run = Path(shutil.copytree(ended, tmp_path / "run"))
    os.truncate(run / "metrics.jsonl", 2**40)
    with pytest.raises(ValueError, match=r"/run/metrics\.jsonl has 1,099,511,627,776 bytes"):
        main(rope.Rope, "train.rope", ["--branch", str(run), "--steps", "15", "--out", str(tmp_path / "branch")])
    assert {path.name for path in (tmp_path / "branch").iterdir()} == {".lock"}


@pytest.mark.slow
def test_checkpoints_are_kept_by_keep_and_keep_every(new, tmp_path):
    finish(*new, "--out", tmp_path / "run", "--steps", 35, "--keep", 2, "--keep-every", 10)
    assert steps(tmp_path / "run" / "checkpoints") == [10, 20, 30, 35]
