"""The command lines, from text to text: `python -m train.rope` and `python -m train.sample`."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxmodels
from jaxmodels.convert.params import flat_arrays
from jaxmodels.text import CharVocabulary
from train import checkpoints, rope, sample
from train.command import one_line_errors
from train.experiment import main, parse, saved_config
from train.optimizers import adam, noam

ROOT = Path(__file__).parents[2]
PROGRAM = "python -m train.rope"
SIZES = {"d-model": 30, "heads": 3, "d-ff": 13, "n-layers": 1, "seq-len": 11, "batch-size": 3, "warmup": 5, "every": 5}
TINY = [f"--{name}={value}" for name, value in SIZES.items()]
TEXT = "".join(f"{i} men and {i * i % 89} women went to sea [in a boat]. The end.\n" for i in range(97))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "sea.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def run_and_output(text, tmp_path_factory) -> tuple[Path, str]:
    """A finished run of 7 steps, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(rope.Config, PROGRAM, [*TINY, "--text", str(text), "--out", str(folder), "--steps", "7"]) == 0
    return folder, out.getvalue()


@pytest.fixture(scope="module")
def run(run_and_output) -> Path:
    return run_and_output[0]


def start(*arguments: object, **environment: str) -> subprocess.Popen:
    """python -m …, in a process of its own."""
    command = [sys.executable, "-m", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, **pipes)


def state(run: Path) -> dict[str, np.ndarray]:
    """Every number that a run's checkpoint holds."""
    config = saved_config(rope.Config, run)
    state = checkpoints.load(run, adam(noam(config.learning_rate, config.d_model, config.warmup), config.adam))
    arrays = flat_arrays(state.model) | flat_arrays(state.optimizer) | {"losses": state.losses}
    return {str(path): np.asarray(array) for path, array in arrays.items()}


def test_an_interrupted_run_goes_on_exactly(text, tmp_path):
    new = [*TINY, "--dropout", 0.1, "--text", text]
    # the processes share what they compile, which is most of their time
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    interrupted = start("train.rope", *new, "--out", tmp_path / "a", "--steps", 1_000_000, **cache)
    for line in interrupted.stdout:
        if line.startswith("step 5:"):
            interrupted.send_signal(signal.SIGINT)
            break
    out, err = interrupted.communicate(timeout=120)
    assert (interrupted.returncode, err) == (130, "")
    message = re.search(r"^stopped at step (\d+) and saved; go on with: (.*)$", out, re.MULTILINE)
    assert message
    assert message[2] == f"python -m train.rope --resume {tmp_path / 'a'}"
    steps = int(message[1]) + 13

    resumed = start("train.rope", "--resume", tmp_path / "a", "--steps", steps, "--every", 1000, **cache)
    straight = start("train.rope", *new, "--out", tmp_path / "b", "--steps", steps, "--every", 1000, **cache)
    for process in (resumed, straight):
        out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
    resumed, straight = state(tmp_path / "a"), state(tmp_path / "b")
    assert len(straight["losses"]) == steps
    assert resumed.keys() == straight.keys()
    for name, array in straight.items():
        np.testing.assert_array_equal(resumed[name], array, err_msg=name)  # bit for bit


def test_what_a_run_prints_and_leaves(run_and_output):
    run, out = run_and_output
    assert re.search(r"^step 5: loss \d\.\d+, validation loss \d\.\d+, greedy sample:\n    .*\|.{25}", out, re.M)
    assert "step 7/7" in out  # the progress bar
    validation = re.search(r"(\d\.\d+)  character 4-gram .*\n +(\d\.\d+)  this model after 7 steps", out)
    assert 0 < float(validation[1]) < float(validation[2])  # seven steps are not enough
    assert f"python -m train.sample {run}" in out

    assert [path.name for path in run.iterdir()] == ["checkpoint"]
    about = json.loads((run / "checkpoint" / "run.json").read_text())
    assert about["step"] == 7
    assert about["config"]["d_ff"] == 13
    model = jaxmodels.load(run / "checkpoint" / "model")
    assert (model.d_model, model.n_vocab) == (30, len(set(TEXT)))
    assert CharVocabulary.load(run / "checkpoint" / "vocabulary.json") == CharVocabulary.of(TEXT)


def test_flags_come_from_the_run_or_the_preset(run):
    small, original = (
        parse(rope.Config, PROGRAM, arguments).config for arguments in ([], ["--preset=original", "--heads", "8"])
    )
    assert small == rope.Config.small()
    assert (original.seq_len, original.n_layers, original.batch_size, original.heads) == (512, 6, 4, 8)
    resumed = parse(rope.Config, PROGRAM, ["--resume", str(run), "--steps", "11"]).config
    assert (resumed.seq_len, resumed.steps) == (11, 11)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--resume {run}", "has taken 7 steps already: ask for more with --steps"),
        ("--resume {run} --steps 11 --heads 5", "was trained with heads=3, not heads=5"),
        ("--resume {run} --preset small", "was trained with d_model=30, "),
        ("--resume {run} --steps 11 --text {other}", "was trained on another text than .*other.txt"),
        ("--resume {run} --steps 11 --out elsewhere", "leave --out away"),
        ("--preset huge", "--preset huge is none of small, original"),
        ("--resume {empty}", "empty holds no checkpoint of a training run"),
        ("--text {text} --out {run}", "is there already: go on with it by --resume"),
        ("--text {text} --out {text}", "is there already"),
        ("--text {tiny}", "the training text has 9 tokens, fewer than .* seq_len=128"),
        ("--text {tiny} --seq-len 3", "the validation text has 1 tokens"),
        ("--text {empty}/nothing.txt", "is not python_docs, tiny_shakespeare or a readable UTF-8 file"),
        ("--text {text} --heads 3", "d_model=128 is not divisible by heads=3"),
        ("--text {text} --d-model 15 --heads 3 --seq-len 11", "rope_percentage=1.0 turns 5 of d_k=5"),
    ],
)
def test_bad_input_is_a_value_error_before_any_work(arguments, message, text, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {name: tmp_path / name for name in ("empty", "other.txt", "tiny.txt")}
    files["empty"].mkdir()
    files["other.txt"].write_text(TEXT.replace("sea", "tea"))
    files["tiny.txt"].write_text("ten chars.")
    names = {"run": run, "text": text, **{name.removesuffix(".txt"): path for name, path in files.items()}}
    with pytest.raises(ValueError, match=message):
        main(rope.Config, PROGRAM, arguments.format(**names).split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags", ["--steps 0", "--seed -1", "--dropout 1.0", "--learning-rate 0"])
def test_a_flag_out_of_range_is_a_usage_error(flags, capsys):
    with pytest.raises(SystemExit) as error:
        main(rope.Config, PROGRAM, flags.split())
    assert error.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_run_is_found_by_a_relative_path(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    relative = Path(run.name)
    transformation = adam(noam(1.0, 30, 5), "original")
    assert checkpoints.load(relative, transformation).step == checkpoints.load(run, transformation).step == 7


def test_a_damaged_checkpoint_is_an_error(run, tmp_path):
    for name, content in {"run.json": "{", "vocabulary.json": "[]"}.items():
        folder = tmp_path / name / "checkpoint"
        folder.mkdir(parents=True)
        (folder / "run.json").write_bytes((run / "checkpoint" / "run.json").read_bytes())
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match=name):
            checkpoints.load_model(tmp_path / name)
    with pytest.raises(ValueError, match=r"optimizer does not hold the arrays"):
        checkpoints.load(run, adam(0.1))  # no schedule: another state


def test_errors_are_one_line(capsys):
    process = start("train.rope", "--text", "nowhere.txt")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert re.fullmatch(r"python -m train.rope: text='nowhere.txt' is not .*\n", err)
    with pytest.raises(SystemExit) as error, one_line_errors("train"):
        raise KeyboardInterrupt
    assert error.value.code == 130
    assert capsys.readouterr().err == "train: interrupted\n"
    with pytest.raises(SystemExit, match=r"^train: .*No such file"), one_line_errors("train"):
        (ROOT / "nowhere" / "file").read_text()


def test_sample_continues_the_prompt(run, capsys):
    def write(*flags: object) -> str:
        sample.main([str(run), "--prompt", "7 men [", "--length", "29", *map(str, flags)])
        return capsys.readouterr().out

    drawn = write("--seed", 3)
    assert drawn.startswith("7 men [")
    assert len(drawn) == 7 + 29 + 1
    assert drawn == write("--seed", 3)
    assert drawn != write("--seed", 4)
    assert write("--temperature", 0) == write("--top-k", 1)


def test_a_long_text_never_reaches_beyond_the_trained_length(run):
    model, vocabulary = checkpoints.load_model(run)
    logits = jax.jit(lambda ids: model(ids[:, None])[:, 0])
    ids = vocabulary.encode("5 men and 25 women")
    text = ids
    for _ in range(3):
        piece = np.resize(text[-5:], 11)  # what lies behind a position does not change its logits
        for i in range(5, 11):
            piece[i] = logits(piece)[i - 1].argmax()
        text = np.concatenate([text, piece[5:]])
    np.testing.assert_array_equal(sample.continue_text(model, ids, 17, seq_len=11), text[len(ids) :][:17])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "sea ñ"], "characters 'ñ' are not among"),
        (["--prompt", ""], "non-empty prompts"),
        (["--length", "0"], "length=0 must be at least 1"),
        (["--temperature", "-1"], "temperature=-1"),
        (["--top-p", "2"], "top_p=2"),
    ],
)
def test_sample_refuses_bad_input(flags, message, run):
    with pytest.raises(ValueError, match=message):
        sample.main([str(run), *flags])


def test_sample_needs_a_run(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint of a training run"):
        sample.main([str(tmp_path)])
