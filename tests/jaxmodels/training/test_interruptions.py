"""Full disks, closed pipes, hung-up terminals and early signals, as real processes."""

import errno
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import optax
import pytest

from jaxmodels.io import steps as stored
from jaxmodels.io.steps import steps
from jaxmodels.text import encoding
from jaxmodels.training import metrics
from jaxmodels.training.checkpoints import Checkpoints, Position
from jaxmodels.training.config import Options
from jaxmodels.training.script import main, train
from tests.train_common import ROOT, TEXT, TINY, program, start
from train import rope


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / "run", program(optax.adam(0.1)), keep=9)
    yield opened
    opened.close()


def position(checkpoints: Checkpoints, n: int) -> Position:
    return Position(checkpoints.program.make_state(0), {"next_index": n}, [0.5] * n)


def block(checkpoints: Checkpoints, step: int) -> None:
    """A file where the checkpoint's folder would be."""
    checkpoints.folder.mkdir(exist_ok=True)
    (checkpoints.folder / str(step)).touch()


def test_a_failed_save_is_noticed_and_the_next_one_replaces_it(checkpoints, capsys):
    block(checkpoints, 3)
    checkpoints.save(position(checkpoints, 3))
    assert checkpoints.failed
    checkpoints.save(position(checkpoints, 4))
    warning = rf"warning: checkpoint 3 could not be saved: {checkpoints.folder}/3 .*folder.*; trying again\n"
    assert re.fullmatch(warning, capsys.readouterr().err)
    checkpoints.finish(position(checkpoints, 4))
    assert not checkpoints.failed
    assert steps(checkpoints.folder) == [4]


def test_the_last_save_is_tried_again_from_memory(checkpoints, capsys):
    block(checkpoints, 3)
    checkpoints.save(position(checkpoints, 3))
    with pytest.raises(OSError, match=r"checkpoint 3 could not be saved either: .*/3 .*folder"):
        checkpoints.finish(position(checkpoints, 3))
    assert capsys.readouterr().err.count("\n") == 1
    block(checkpoints, 5)
    checkpoints.retrying = False
    checkpoints.save(position(checkpoints, 5))
    (checkpoints.folder / "5").unlink()
    checkpoints.finish(position(checkpoints, 5))
    assert steps(checkpoints.folder) == [5]


@pytest.fixture(scope="module")
def new(tmp_path_factory, compile_cache) -> list[str]:
    """Flags of a run."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "sea.txt").write_text(TEXT)
    return [*map(str, [*TINY, "--text", folder / "sea.txt", "--no-tensorboard"])]


@pytest.mark.slow
def test_training_from_python_calls_a_function_and_prints_nothing(new, tmp_path, capsys, compile_cache):
    calls = []
    config = rope.Config(
        d_model=30, heads=3, d_ff=13, n_layers=1, seq_len=11, batch_size=4, text=new[-2], steps=3, every=2
    )
    options = Options(tensorboard=False, compile_cache=compile_cache)
    result = train(rope.Rope(config), tmp_path / "run", callback=lambda *call: calls.append(call), options=options)
    assert [(step, *values) for step, values in calls] == [
        (1, "loss", "grad_norm", "seconds"),
        (2, "loss", "grad_norm", "seconds"),
        (2, "validation_loss"),
        (3, "loss", "grad_norm", "seconds"),
        (3, "validation_loss"),
    ]
    assert calls[-1][1]["validation_loss"] == result.loss
    assert [{"step": step, **values} for step, values in calls] == metrics.read(tmp_path / "run")
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_a_run_with_two_lines(new, tmp_path):
    run = tmp_path / "run"
    limited = "import resource, os, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000)); "
    limited += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    command = [sys.executable, "-c", limited, "-m", "train.rope", *new, "--steps", "40", "--out", str(run)]
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    first, second = done.stderr.splitlines()
    file = rf"{run}/checkpoints/\d+/\S+: File too large"
    assert re.fullmatch(rf"warning: checkpoint 5 could not be saved: {file}; trying again", first)
    assert re.fullmatch(rf"python -m train.rope: checkpoint \d+ could not be saved either: {file}", second)
    assert steps(run / "checkpoints") == []
    assert main(rope.Rope, "train.rope", [*new, "--steps", "40", "--out", str(run)]) == 0  # with room again
    assert steps(run / "checkpoints") == [30, 35, 40]


def in_a_small_file_system(options: str, place: Path, new: list) -> subprocess.CompletedProcess:
    """Training in a file system that is mounted with these options."""
    mounted = f"mount -t tmpfs -o {options} tmpfs {place}"
    private = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*private, mounted], capture_output=True, check=False).returncode:
        pytest.skip("a file system of its own cannot be mounted here")
    training = shlex.join([sys.executable, "-m", "train.rope", *new, "--steps", "40", "--out", f"{place}/run"])
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.run(
        [*private, f"{mounted} && {training}"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [80, 120])
def test_a_full_file_system_ends_a_run_with_two_lines(new, tmp_path, kilobytes):
    done = in_a_small_file_system(f"size={kilobytes}k", tmp_path, new)
    assert done.returncode == 2, done.stderr
    first, second = done.stderr.splitlines()
    assert re.fullmatch(r"warning: checkpoint 5 could not be saved: .*: No space left on device; trying again", first)
    assert re.fullmatch(r"python -m train.rope: checkpoint \d+ could not be saved either: .*No space left.*", second)


@pytest.mark.slow
@pytest.mark.parametrize("files", [12, 13, 14])
def test_a_file_system_without_room_for_another_folder_ends_a_run(new, tmp_path, files):
    """Threads of Orbax would wait five minutes for a folder that cannot be made."""
    began = time.monotonic()
    done = in_a_small_file_system(f"size=4m,nr_inodes={files}", tmp_path, new)
    assert time.monotonic() - began < 150
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(r"python -m train.rope: checkpoint \d+ could not be saved either: .*No space left.*", last)


def until(process: subprocess.Popen, text: str) -> str:
    """Read a process's output up to a line with this text."""
    shown = ""
    for line in process.stdout:
        shown += line
        if text in line:
            return shown
    raise AssertionError(shown + process.stderr.read())


@pytest.mark.slow
def test_a_closed_pipe_saves_and_ends_a_run(new, tmp_path):
    process = start("train.rope", *new, "--steps", 100_000, "--every", 50, "--out", tmp_path / "run")
    until(process, "step 50: loss")
    process.stdout.close()
    assert process.wait(timeout=120) == 141
    err = process.stderr.read()
    (stopped,) = re.findall(r"^standard output was closed: stopped at step (\d+); .*--resume .*/run\n$", err)
    assert steps(tmp_path / "run" / "checkpoints")[-1] == int(stopped)
    process.stderr.close()


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_hangs_up_saves_and_ends_a_run_unless_it_ignores_that(new, tmp_path, ignored):
    program = "import signal, sys, runpy; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    program += "sys.argv = sys.argv[1:]; runpy.run_module('train.rope', run_name='__main__', alter_sys=True)"
    flags = [*new, "--steps", "20000", "--every", "50", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-c", program, "train.rope", *flags]
    process = (
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if ignored
        else start("train.rope", *flags)
    )
    until(process, "step 50: loss")
    process.send_signal(signal.SIGHUP)
    if ignored:  # as under nohup
        until(process, "step 100: loss")
        process.terminate()
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    stopped = int(re.search(r"^stopped at step (\d+);", out, re.M)[1])
    assert steps(tmp_path / "run" / "checkpoints")[-1] == stopped


@pytest.mark.slow
@pytest.mark.parametrize("module", ["train.rope", "jaxmodels"])
def test_ctrl_c_while_modules_are_imported_is_one_line(module, tmp_path):
    """JAX is replaced by a module that says that it is being imported, and waits."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    arguments = ["evaluate", "x"] if module == "jaxmodels" else []
    process = start(module, *arguments, PYTHONPATH=f"{tmp_path}:{ROOT}")
    until(process, "importing")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    command = "jaxmodels evaluate" if module == "jaxmodels" else "python -m train.rope"
    assert (process.returncode, re.fullmatch(r".*interrupted\n", err) is not None) == (130, True)
    assert command in err


@pytest.mark.slow
def test_a_terminal_of_another_encoding_does_not_stop_a_run(new, tmp_path):
    (tmp_path / "wide.txt").write_text(TEXT.replace("sea", "séa\x1b"))
    flags = [*new, "--text", tmp_path / "wide.txt", "--steps", 2, "--out", tmp_path / "rün"]
    process = start("train.rope", *flags, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert "train.sample '" in out
    assert "\x1b" not in out


def test_a_bucket_is_refused_before_any_work(new, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flag in ("--out", "--resume", "--branch"):
        with pytest.raises(ValueError, match=rf"{flag[2:]}=gs://bucket/run .*gcsfuse"):
            main(rope.Rope, "python -m train.rope", [*new, flag, "gs://bucket/run"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_without_a_terminal_there_is_a_line_every_ten_seconds(new, tmp_path):
    process = start("train.rope", *new, "--steps", 10**6, "--every", 10**6, "--out", tmp_path / "run")
    began, lines = time.monotonic(), []
    threading.Timer(40, process.terminate).start()
    for line in process.stdout:
        lines.append((time.monotonic() - began, line))
    process.communicate(timeout=120)
    shown = [at for at, line in lines if re.match(r"step \d+/1000000", line)]
    assert len(shown) >= 3
    assert max(later - before for before, later in itertools.pairwise(shown)) < 11
    assert "nan" not in "".join(line for _, line in lines)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_the_encoding_of_a_text(new, tmp_path, monkeypatch, capsys, number, code):
    """It does not wait for the end of a text of gigabytes, and leaves neither ids nor a run."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    encode = encoding.encoded

    def signaled(*arguments: object) -> list:  # in another thread, for which the main thread waits
        os.kill(os.getpid(), number)
        return encode(*arguments)

    monkeypatch.setattr(encoding, "encoded", signaled)
    assert main(rope.Rope, "python -m train.rope", [*new, "--out", str(tmp_path / "run")]) == code
    assert capsys.readouterr().out == "stopped while the text was read; continue with: the same command\n"
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]
    assert not list(temporary.iterdir())


@pytest.mark.slow
def test_a_signal_ends_the_counting_of_n_grams_and_the_run_goes_on_later(new, tmp_path, monkeypatch, capsys):
    run, flags = tmp_path / "run", [*new, "--steps", "2"]

    def signaled(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(60)
        pytest.fail("it waited")

    with monkeypatch.context() as patched:
        patched.setattr("jaxmodels.training.experiment.NGram", signaled)
        assert main(rope.Rope, "python -m train.rope", [*flags, "--out", str(run)]) == 0
    assert f"stopped at step 0; continue with: python -m train.rope --resume {run}\n" in capsys.readouterr().out
    assert main(rope.Rope, "python -m train.rope", ["--resume", str(run), "--no-tensorboard"]) == 0
    assert steps(run / "checkpoints") == [2]


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(checkpoints, capsys, monkeypatch):
    """Such as one of which another machine has a file open: the new one is complete."""
    checkpoints.keep = 1
    remove = stored.remove

    def busy(folder) -> None:
        if folder.name == "3":
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(folder))
        remove(folder)

    monkeypatch.setattr(stored, "remove", busy)
    for step in (3, 4):
        checkpoints.save(position(checkpoints, step))
        checkpoints.accept()
        checkpoints.settle()
    assert not checkpoints.retrying
    assert re.fullmatch(r"warning: .*Directory not empty: '.*/checkpoints/3'\n", capsys.readouterr().err)
    assert steps(checkpoints.folder) == [3, 4]
