"""The command lines, from text to text: `python -m train.rope`, `train.sample`, `train.evaluate`, `train.plot`."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import jaxmodels
from jaxmodels.text import CharVocabulary, load_vocabulary
from jaxmodels.training import metrics
from jaxmodels.training.checkpoints import latest_model
from jaxmodels.training.commands import evaluate, plot, sample
from jaxmodels.training.experiment import continue_text
from jaxmodels.training.script import main, parse
from jaxmodels.training.tokenize import tokenize
from jaxmodels.transformer import AutoregressiveTransformer
from tests.train_common import ROOT, TEXT, TINY, start
from train import rope, synthesizer

PROGRAM = "python -m train.rope"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "sea.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module", autouse=True)
def cache(compile_cache):
    """Set by the first run that names it, for all in this file."""
    return compile_cache


def train(*arguments: object) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(rope.Rope, PROGRAM, list(map(str, arguments))) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def run_and_output(text, cache, tmp_path_factory) -> tuple[Path, str]:
    """A finished run of 7 steps, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--keep", 1, "--profile", 2, "--compile-cache", cache]
    return folder, train(*TINY, "--text", text, "--out", folder, "--steps", 7, *flags)


@pytest.fixture(scope="module")
def run(run_and_output) -> Path:
    return run_and_output[0]


def test_a_run_prints_its_result_and_writes_its_files(run_and_output):
    run, out = run_and_output
    assert re.search(
        r"^step 5: loss \d\.\d+ \(mean of 5 steps\), validation loss \d\.\d+, written greedily:\n    .*\|", out, re.M
    )
    assert "step 7/7" in out  # the progress bar
    bar, reached = re.search(r"(\d\.\d+)  character 4-gram .*\n +(\d\.\d+)  this model after 7 steps", out).groups()
    assert 0 < float(bar) < float(reached)  # seven steps are not enough
    assert f"python -m train.sample {run}" in out

    names = {".lock", "checkpoints", "config.json", "metrics.jsonl", "profile", "tensorboard", "vocabulary.json"}
    assert {path.name for path in run.iterdir()} == names
    assert json.loads((run / "config.json").read_text())["config"]["d_ff"] == 13
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["7"]
    model = jaxmodels.load(run / "checkpoints" / "7" / "model")
    assert (model.d_model, model.n_vocab) == (30, len(set(TEXT)))
    assert load_vocabulary(run / "vocabulary.json") == CharVocabulary.of(TEXT)
    lines = metrics.read(run)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 8))
    assert [line["step"] for line in lines if "validation_loss" in line] == [5, 7]
    assert list((run / "profile").rglob("*.xplane.pb"))
    assert list((run / "tensorboard").iterdir())


@pytest.mark.slow
def test_a_finished_run_is_evaluated_again_and_extended_by_more_steps(run_and_output, text, tmp_path):
    def results(out: str) -> list[str]:
        return out[out.index("\nvalidation loss") :].splitlines()[:4]

    first = train(*TINY, "--text", text, "--out", tmp_path / "run", "--steps", 4)
    again = train(*TINY, "--text", text, "--out", tmp_path / "run", "--steps", 4)
    assert "at step 4\n" in again
    assert results(first) == results(again)
    assert results(train("--resume", tmp_path / "run", "--steps", 7)) == results(run_and_output[1])


def test_flags_come_from_the_run_or_the_preset(run):
    small, original = (
        parse(rope.Rope, PROGRAM, arguments)[0].config for arguments in ([], ["--preset=original", "--heads", "8"])
    )
    assert small == rope.Config.small()
    assert (original.seq_len, original.n_layers, original.batch_size, original.heads) == (512, 6, 4, 8)
    _, resumed = parse(rope.Rope, PROGRAM, ["--resume", str(run), "--steps", "11", "--mesh", "fsdp=2"])
    assert (resumed.config.seq_len, resumed.config.steps, resumed.options.mesh) == (11, 11, "fsdp=2")


def test_a_run_is_resumed_only_by_its_own_script(run):
    with pytest.raises(ValueError, match=r"train\.rope.*train\.synthesizer"):
        parse(synthesizer.Synthesizer, "python -m train.synthesizer", ["--resume", str(run)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--resume {run} --steps 11 --heads 5", "heads=3, .*heads=5.*--resume"),
        ("--text {text} --out {run}", "seq_len=11, .*--out"),
        ("--resume {run} --preset small", "seq_len=11, "),
        ("--resume {run} --steps 11 --text {other}", "{run} .*other.txt.*--text"),
        ("--resume {run} --steps 11 --out elsewhere", "--resume .*--out"),
        ("--preset huge", "preset='huge'.*small, original"),
        ("--resume {empty}", "empty "),
        ("--text {text} --out {text}", "{text} .*--out"),
        ("--text {text} --out {run}/checkpoints/7/model", "config.json .*format 1\\b.*3"),
        ("--text {tiny}", "training text has 9 .*seq_len=128\\b.*129"),
        ("--text {tiny} --seq-len 3", "validation text has 1 .*seq_len=3\\b.*4"),
        ("--text {empty}/nothing.txt", "text='.*nothing.txt'"),
        ("--text {empty}", "text='.*empty'.*train.tokenize"),
        ("--text {text} --heads 3", "d_model=128 .*heads=3"),
        ("--text {text} --d-model 15 --heads 3 --seq-len 11", "rope_percentage=1.0 .*d_k=5"),
        ("--text {text} --mesh fsdp=3", "mesh='fsdp=3' .*3.*1"),
        ("--text {text} --mesh rows=2", "mesh='rows=2'.*data, fsdp, tensor"),
        ("--text {text} --accumulate 3", "batch_size=16 .*accumulate=3"),
        ("--text {text} --batch-size 1048576", "batch_size=1,048,576 .*seq_len=128 .*134,217,728 .* 1,048,576 "),
        ("--text {text} --coordinator localhost:1", "--coordinator, --processes and --process "),
    ],
)
def test_bad_input_is_a_value_error_before_any_work(arguments, message, text, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {name: tmp_path / name for name in ("empty", "other.txt", "tiny.txt")}
    files["empty"].mkdir()
    files["other.txt"].write_text(TEXT.replace("sea", "tea"))
    files["tiny.txt"].write_text("ten chars.")
    names = {"run": run, "text": text, **{name.removesuffix(".txt"): path for name, path in files.items()}}
    with pytest.raises(ValueError, match=message.format(**names)):
        main(rope.Rope, PROGRAM, arguments.format(**names).split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "flags",
    [
        *("--steps 0", "--seed -1", "--dropout 1.0", "--learning-rate 0", "--schedule cosine --steps 5", "--b2 1"),
        *("--weight-decay -1", "--profile -3"),
    ],
)
def test_a_flag_out_of_range_is_refused(flags):
    name = flags.split()[-2].removeprefix("--").replace("-", "_")
    with pytest.raises(ValueError, match=rf"\b{name}="):
        main(rope.Rope, PROGRAM, flags.split())


@pytest.mark.slow
def test_errors_are_one_line(capsys):
    process = start("train.rope", "--text", "nowhere.txt")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert re.fullmatch(r"python -m train.rope: text='nowhere.txt' .*\n", err)
    for command in (evaluate, sample, plot):
        assert command.main(["nowhere"], "command") == 2
        assert re.fullmatch(r"command: nowhere.*\n", capsys.readouterr().err)


@pytest.mark.slow
def test_sample_continues_the_prompt(run, capsys):
    def write(*flags: object) -> str:
        assert sample.main([str(run), "--prompt", "7 men [", "--length", "29", *map(str, flags)]) == 0
        return capsys.readouterr().out

    drawn = write("--seed", 3)
    assert drawn.startswith("7 men [")
    assert len(drawn) == 7 + 29 + 1
    assert drawn == write("--seed", 3)
    assert drawn != write("--seed", 4)
    assert write("--temperature", 0) == write("--top-k", 1)


@pytest.mark.slow
def test_a_long_text_never_exceeds_the_trained_length(run):
    model, step = latest_model(run)
    assert step == 7
    logits = jax.jit(lambda ids: model(ids[:, None])[:, 0])
    ids = CharVocabulary.of(TEXT).encode("5 men and 25 women")
    text = ids
    for _ in range(3):
        piece = np.resize(text[-5:], 11)  # later tokens do not change a position's logits
        for i in range(5, 11):
            piece[i] = logits(piece)[i - 1].argmax()
        text = np.concatenate([text, piece[5:]])
    np.testing.assert_array_equal(continue_text(model, ids, 17, seq_len=11), text[len(ids) :][:17])
    interrupted = iter([False, True])
    assert len(continue_text(model, ids, 17, seq_len=11, interrupted=lambda: next(interrupted))) == 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "sea ñ"], "characters: 'ñ'"),
        (["--prompt", ""], "prompt=''"),
        (["--length", "0"], "length=0 .*1"),
        (["--temperature", "-1"], "temperature=-1"),
        (["--top-p", "2"], "top_p=2"),
    ],
)
def test_sample_refuses_bad_input(flags, message, run):
    with pytest.raises(ValueError, match=message):
        sample.sample(sample.parser().parse_args([str(run), *flags]))


def test_sample_needs_a_run(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        sample.sample(sample.parser().parse_args([str(tmp_path)]))


def evaluated(capsys, *arguments: object) -> dict[str, float]:
    capsys.readouterr()
    assert evaluate.main(list(map(str, arguments))) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    return {line[:22].strip(): float(line[22:].split()[0]) for line in lines}


@pytest.mark.slow
def test_evaluate_finds_the_loss_that_training_did(run, tmp_path, capsys):
    expected = metrics.read(run)[-1]["validation_loss"]
    found = evaluated(capsys, run)
    assert found["loss"] == pytest.approx(expected, abs=1e-4)
    assert found["perplexity"] == pytest.approx(np.exp(expected), rel=1e-4)
    assert found["bits per character"] == found["bits per byte"] == pytest.approx(expected / np.log(2), abs=1e-4)

    # the same as a model with a vocabulary of its own, on a text in a file
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(TEXT[int(0.9 * len(TEXT)) :])
    model = shutil.copytree(run / "checkpoints" / "7" / "model", tmp_path / "model")
    shutil.copy(run / "vocabulary.json", model)
    assert evaluated(capsys, model, "--text", held_out, "--seq-len", 11, "--batch-size", 5) == found


@pytest.mark.slow
def test_a_run_in_a_folder_above_is_evaluated_and_resumed(run, tmp_path, capsys, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    loss = evaluated(capsys, "../run")["loss"]
    assert loss == evaluated(capsys, tmp_path / "run")["loss"]
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    shutil.copytree(run, tmp_path / "elsewhere" / "run")
    for folder in ("../run", "../link/../run"):
        assert "after 9 steps\n" in train("--resume", folder, "--steps", 9)
        assert (Path(folder) / "checkpoints" / "9" / "model" / "params").is_dir()
        assert evaluated(capsys, folder)["loss"] != loss


def test_a_run_whose_path_is_a_pattern_is_refused_and_keeps_its_checkpoints(run, text, tmp_path, capsys):
    odd = shutil.copytree(run, tmp_path / "run[v1]")
    before = {path: path.read_bytes() for path in odd.rglob("*") if path.is_file()}
    assert evaluated(capsys, odd)["loss"] == evaluated(capsys, run)["loss"]
    for flags in (["--resume", str(odd), "--steps", "9"], [*TINY, "--text", str(text), "--out", str(odd / "new")]):
        with pytest.raises(ValueError, match=r"'run\[v1\]' is in its path"):
            main(rope.Rope, PROGRAM, flags)
    assert before == {path: path.read_bytes() for path in odd.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_bits_per_byte_and_per_character_are_of_the_predicted_text(run, tmp_path, capsys):
    tokenize(str(ROOT / "LICENSE"), tmp_path / "tokens", "bytes")
    model = AutoregressiveTransformer(256, 6, 3, 5, 1, rngs=nnx.Rngs(0))
    jaxmodels.save(model, tmp_path / "model")
    shutil.copy(tmp_path / "tokens" / "vocabulary.json", tmp_path / "model")
    (tmp_path / "wide.txt").write_text("ñ€" * 50)  # 2 and 3 bytes, one character each
    found = evaluated(capsys, tmp_path / "model", "--text", tmp_path / "wide.txt", "--seq-len", 10)
    assert found["bits per byte"] == pytest.approx(found["loss"] / np.log(2), abs=1e-3)
    assert found["bits per character"] == pytest.approx(2.5 * found["bits per byte"], rel=0.02)  # one is cut in two


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["{run}", "--text", "{empty}/nothing"], "text='.*nothing'"),
        (["{run}", "--seq-len", "600"], "given text has 522 .*seq_len=600"),
        (["{run}/checkpoints/7/model"], "--text"),
        (["{empty}"], "config.json"),
        (["{run}", "--experiment", "train.feedback"], r"train\.rope, .*train\.feedback"),
        (["{run}", "--experiment", "nowhere"], "experiment='nowhere'"),
        (["{run}", "--mesh", "data=3"], "mesh='data=3' .*3.*1"),
    ],
)
def test_evaluate_refuses_bad_input(flags, message, run, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluate.print_scores(evaluate.parser().parse_args([flag.format(run=run, empty=tmp_path) for flag in flags]))


def test_plot_draws_runs(run, tmp_path):
    assert plot.main([str(run), str(run), "--out", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    train, validation = plot.curves(run)
    np.testing.assert_array_equal(train[:, 0], range(1, 8))
    np.testing.assert_array_equal(validation[:, 0], [5, 7])
    with pytest.raises(ValueError, match=rf"{tmp_path} .*metrics.jsonl"):
        plot.draw([tmp_path], tmp_path / "none.png")
    with pytest.raises(SystemExit):
        plot.main([])
