"""Sizes and texts that only a run's files name: each hyperparameter is allowed, and their product is not."""

import dataclasses
import json
import math
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

from jaxmodels.retro.retrieval.examples import read
from jaxmodels.sharding import make_mesh
from jaxmodels.text import CharVocabulary
from jaxmodels.training.config import Options
from jaxmodels.training.loop import Evaluation
from jaxmodels.training.runs import unnamed as limits
from jaxmodels.training.runs.folder import saved_experiment, write_about
from jaxmodels.training.script import main, parse, train
from jaxmodels.training.signals import Stop
from tests.train_common import TEXT
from train import feedback, neox, retro, rope, rope_value

SIZES = {"d_model": 12, "heads": 3, "d_ff": 13, "n_layers": 1, "seq_len": 11}
L = 4


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "sea.txt"
    file.write_text(TEXT)
    return file


def unnamed(kind, *names: str, **fields):
    """Experiment of which a run's files alone have some hyperparameters."""
    made = kind(kind.config_class(**fields))
    made.unnamed = frozenset(names)
    return made


@pytest.mark.parametrize("kind", [rope.Rope, retro.Retro])
def test_a_run_of_others_is_not_trained_on_a_text_of_another_checksum(kind, text, tmp_path):
    """A model of the text, its characters or an index of it would be left in their folder."""
    run = tmp_path / "theirs" / "run"
    (run / "checkpoints").mkdir(parents=True)
    others = {"chunk_len": L, "index": str(run.parent / "index")} if kind is retro.Retro else {}
    write_about(run, kind(kind.config_class(text=str(text), **SIZES, **others)), "0" * 64, {})
    arguments = ["--resume", str(run), "--no-tensorboard"]
    with pytest.raises(ValueError, match=r"sea\.txt' of the run has not the sha256.* --text .*sea\.txt"):
        main(kind, "python -m train.name", arguments)
    assert {path.name for path in (tmp_path / "theirs").rglob("*")} <= {"run", "checkpoints", "config.json", ".lock"}
    named, _ = parse(kind, "python -m train.name", [*arguments, "--text", str(text)])
    named.recorded = "0" * 64
    named.refuse_unnamed_data("1" * 64)


SECRET = "8412|'8'"  # what errors repeat of it: all of it, or its first character that a vocabulary lacks


@pytest.mark.parametrize("name", ["secret.txt", "secret.jsonl"])
def test_no_error_repeats_a_text_that_only_a_run_of_others_names(name, tmp_path):
    file, run = tmp_path / name, tmp_path / "run"
    file.write_text('{"text": 8412}\n')
    run.mkdir()
    write_about(run, rope.Rope(rope.Config(text=str(file), seq_len=7)), "0" * 64, {})
    saved, vocabulary = saved_experiment(run), CharVocabulary.of("The sea")
    with pytest.raises(ValueError, match=rf"{name}' of the run cannot be read.* --text ") as raised:
        saved.held_out(run, vocabulary, "0" * 64)
    assert not re.search(SECRET, str(raised.value))
    saved.unnamed = frozenset()
    with pytest.raises(ValueError, match=SECRET):
        saved.held_out(run, vocabulary, "0" * 64)
    file.unlink()
    with pytest.raises((ValueError, OSError), match=rf"{name}|No such file"):
        saved_experiment(run).held_out(run, vocabulary, "0" * 64)


@pytest.mark.slow
def test_the_step_of_a_run_of_others_takes_no_memory_without_end(monkeypatch):
    """It is compiled first: neither a step nor an evaluation begins."""
    monkeypatch.setattr(limits, "BYTES", 100_000)
    monkeypatch.setattr(limits, "GROWTH", 0)
    fields = {**SIZES, "batch_size": 499}
    theirs, own = unnamed(rope.Rope, "batch_size", **fields), unnamed(rope.Rope, **fields)

    def step(made: rope.Rope) -> None:
        program = made.program(7, make_mesh(""))
        made.refuse_unnamed_size(program, stored=True)
        program.compile(program.lower_step(made.abstract_batch()))

    def evaluate(made: rope.Rope) -> None:
        program = made.program(7, make_mesh(""))
        made.refuse_unnamed_size(program, stored=True)
        Evaluation(program, [{"tokens": np.zeros(12, np.int32)}], 499, Stop())(program.make_state(0))

    for begin in (step, evaluate):
        with pytest.raises(ValueError, match=r"a step of the run takes .* at most 100,000 .*--batch-size 499"):
            begin(theirs)
        begin(own)
    monkeypatch.setattr(limits, "GROWTH", 10**6)  # large checkpoints have large steps
    step(theirs)


def test_a_run_of_others_without_a_checkpoint_has_no_state_of_any_size(monkeypatch):
    monkeypatch.setattr(limits, "BYTES", 1000)
    made = unnamed(rope.Rope, "batch_size", **SIZES)
    program = made.program(7, make_mesh(""))
    assert program.state_bytes > 1000
    with pytest.raises(ValueError, match=r"the state of the run takes .* at most 1,000 .*--batch-size 16"):
        made.refuse_unnamed_size(program, stored=False)
    made.refuse_unnamed_size(program, stored=True)
    unnamed(rope.Rope, **SIZES).refuse_unnamed_size(program, stored=False)


def test_neighbors_that_only_a_run_of_others_names_have_a_limit_together(text, tmp_path, monkeypatch):
    monkeypatch.setattr(retro, "UNNAMED_BYTES", 1000)
    fields = {"embedder": "ngrams:64:1:3", "chunk_len": L, "seq_len": 11, "passes": 3, "index": str(tmp_path / "index")}
    theirs = unnamed(retro.Retro, "neighbors", text=str(text), **fields)
    ids = theirs.tokens().validation
    for refused in (theirs.task, lambda: theirs.examples(ids, tmp_path / "run")):
        with pytest.raises(ValueError, match=r"neighbors=2 of .* bytes, must be at most 1,000 .*--neighbors 2"):
            refused()
    assert not list((tmp_path / "index").glob("*.npz"))
    own = retro.Retro(theirs.config)
    own.task()
    theirs.task()  # they are in files
    assert len(own.examples(ids, tmp_path / "run")) == len(ids) // 11


def test_a_small_file_does_not_stand_for_neighbors_of_any_number(tmp_path):
    file, shape = tmp_path / "neighbors.npz", (300, 20, 5)
    neighbors = np.zeros(shape, np.int32)
    np.savez(file, fingerprint="same", neighbors=neighbors)
    np.testing.assert_array_equal(read(file, "same", shape), neighbors)
    np.savez_compressed(file, fingerprint="same", neighbors=neighbors)
    with zipfile.ZipFile(file) as archive:
        assert file.stat().st_size < 4 * math.prod(shape) < sum(entry.file_size for entry in archive.infolist())
    assert read(file, "same", shape) is None


def test_generated_problems_of_a_length_that_only_a_run_of_others_names_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(rope_value, "UNNAMED_CHARACTERS", 64 * 20)
    long = rope_value.RopeValue(rope_value.Config(seq_len=21))
    sha256 = long.task().sha256
    write_about(tmp_path, long, sha256, {})
    for length in (21, 16):  # --seq-len 16: the run's own are compared with its checksum
        theirs = saved_experiment(tmp_path)
        theirs.config = dataclasses.replace(theirs.config, seq_len=length)
        with pytest.raises(ValueError, match=r"seq_len=21 of the run must be at most 20; .* --seq-len 21"):
            theirs.held_out(tmp_path, rope_value.VOCABULARY, sha256)
    theirs.config, theirs.unnamed = long.config, theirs.unnamed - {"seq_len"}
    assert len(theirs.held_out(tmp_path, rope_value.VOCABULARY, sha256)) == rope_value.VALIDATION


@pytest.fixture
def own(text, tmp_path, monkeypatch) -> Path:
    """A run of two steps that its user trained, with a key in a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    flags = [*sizes, "--batch-size=4", "--steps=2", f"--text={text}", "--no-tensorboard"]
    assert main(rope.Rope, "python -m train.rope", [*flags, "--out", str(tmp_path / "own")]) == 0
    return tmp_path / "own"


def unnamed_when_resumed(run: Path, *flags: str) -> frozenset[str]:
    return parse(rope.Rope, "python -m train.rope", ["--resume", str(run), *flags])[0].unnamed


@pytest.mark.slow
def test_limits_for_runs_of_others_are_not_for_one_s_own(own, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "BYTES", 1)
    monkeypatch.setattr(limits, "GROWTH", 0)
    key = tmp_path / "cache" / "jaxmodels" / "runs.key"
    assert key.stat().st_mode & 0o777 == 0o600
    more = ["--resume", str(own), "--no-tensorboard", "--steps=3"]
    assert unnamed_when_resumed(own) == frozenset()
    assert main(rope.Rope, "python -m train.rope", more) == 0
    assert unnamed_when_resumed(own) == frozenset()
    before = (own / "config.json").read_text()
    for changed in (before.replace('"keep": 3', '"keep": 4'), before.replace('"signature": "', '"no": "')):
        (own / "config.json").write_text(changed)
        assert {"batch_size", "text"} <= unnamed_when_resumed(own)
    (own / "config.json").write_text(before)
    key.write_bytes(bytes(32))
    with pytest.raises(ValueError, match=r"a step of the run takes .* --batch-size 4"):
        main(rope.Rope, "python -m train.rope", [*more[:-1], "--steps=4"])
    assert "signature" not in json.loads((own / "config.json").read_text())  # it is not made one's own
    assert main(rope.Rope, "python -m train.rope", [*more[:-1], "--steps=4", "--batch-size=4"]) == 0


def test_a_home_that_cannot_be_written_has_no_signature(text, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    write_about(tmp_path, rope.Rope(rope.Config()), "0" * 64, {}, sign=True)
    assert "signature" not in json.loads((tmp_path / "config.json").read_text())
    assert "text" in unnamed_when_resumed(tmp_path)


@pytest.mark.parametrize("flag", ["--batch-size", "--batch_size"])
def test_a_flag_is_named_in_either_spelling(own, flag):
    (own / "config.json").write_text((own / "config.json").read_text().replace("signature", "none"))
    assert "batch_size" not in unnamed_when_resumed(own, flag, "4")


def test_from_step_without_a_branch_is_refused_in_either_spelling():
    for flag in ("--from-step", "--from_step=3"):
        with pytest.raises(ValueError, match="--from-step needs --branch"):
            parse(rope.Rope, "python -m train.rope", [flag, "3"][: 2 - ("=" in flag)])


@pytest.mark.slow
def test_a_run_of_others_that_has_not_begun_copies_no_run_that_it_names(own, text, tmp_path):
    theirs, about = tmp_path / "theirs", json.loads((own / "config.json").read_text())
    branches = {"branches": [{"run": str(own), "step": 2, "changed": {}}]}
    config = rope.Config(**(about["config"] | {"steps": 3}))
    theirs.mkdir()
    write_about(theirs, rope.Rope(config), about["sha256"], branches)
    refused = pytest.raises(ValueError, match=r"/theirs was branched from .*/own, .*--branch .*/own --from-step 2")
    with refused:
        main(rope.Rope, "python -m train.rope", ["--resume", str(theirs), "--no-tensorboard"])
    with refused:  # all hyperparameters are named, but not the branch
        train(rope.Rope(config), theirs, options=Options(tensorboard=False))
    assert [path.name for path in theirs.iterdir()] == ["config.json"]
    write_about(theirs, rope.Rope(config), about["sha256"], branches, sign=True)
    assert main(rope.Rope, "python -m train.rope", ["--resume", str(theirs), "--no-tensorboard"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"), [(neox.Neox, "checkpoint"), (retro.Retro, "from_decoder"), (feedback.Feedback, "from_parallel")]
)
def test_a_run_of_others_that_has_not_begun_copies_no_weights_that_it_names(kind, name, text, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    made = unnamed(kind, name, **{name: str(mine), "text": str(text)})
    begin = (lambda: made.opened) if kind is neox.Neox else (lambda: made.initial(made.program(7, make_mesh("")), None))
    flag = name.replace("_", "-")
    with pytest.raises(ValueError, match=rf"{name}='.*/mine' of the run would be copied into it; .*--{flag} .*/mine"):
        begin()
