"""A short part of the fuzzers with fixed seeds, and proof that they see what readers should not do."""

import json

import pytest
from tokenizers import AddedToken

from tests.fuzz import command
from tests.fuzz.targets import TARGETS, cuts, faulty, texts
from tests.fuzz.workers import Worker

# Targets whose examples are made and read in milliseconds.
FAST = (
    *("pt", "pt, old", "pt with entries", "pt with entries, old", "safetensors", "npy", "tokenizer, rich"),
    *(
        "tokenizer, cut",
        "vocab.json and merges.txt",
        "vocabularies",
        "documents",
        "neighbors kept",
        "outputs",
        "output folder",
    ),
)
SEEDS = range(4)
# What each faulty reader is found for, by the beginning of the finding's signature; the last three end the process.
FOUND = {
    "raises": "KeyError",
    "names_no_file": "unnamed ValueError",
    "panics": "PanicException",
    "prints": "printed control characters",
    "writes": "event open",
    "writes_beside": "event os.remove",
    "removes_canary": "event os.remove",
    "runs": "event subprocess.Popen",
    "swells": "memory",
    "hangs": "hang",
    "crashes": "crash",
}
ENDING = ("swells", "hangs", "crashes")


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    """A child process, shared by the tests: it takes seconds to start."""
    worker = Worker(tmp_path_factory.mktemp("fuzz"))
    yield worker
    worker.close()


def test_changed_files_are_read_or_refused(worker):
    found = {(name, seed): worker.attempt(name, seed) for name in FAST for seed in SEEDS}
    assert {key: outcome["what"] for key, outcome in found.items() if outcome["what"]} == {}
    assert sum(outcome["refused"] for outcome in found.values()) > len(found) // 3


@pytest.mark.parametrize("name", [name for name in FOUND if name not in ENDING])
def test_faulty_readers_are_found(worker, name):
    assert worker.attempt(name, 0)["signature"].startswith(FOUND[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDING)
def test_readers_that_hang_swell_or_crash_are_found(tmp_path, name):
    worker = Worker(tmp_path, deadline=3.0)
    try:
        assert worker.attempt(name, 0)["signature"].startswith(FOUND[name])
        assert worker.attempt("npy", 0)["what"] is None  # another process goes on
    finally:
        worker.close()


def test_pieces_with_other_ids_than_their_text_are_found(tmp_path, monkeypatch):
    made = texts.tokenizer()
    made.add_tokens([AddedToken("b. a", normalized=False)])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.json").write_text(json.dumps("a b. a b. a"))
    assert cuts.read(tmp_path) > 0
    monkeypatch.setattr("jaxmodels.text.tokenizer.cuts.Added.check", lambda *_: None)  # cuts divide added tokens
    with pytest.raises(AssertionError, match=r"ids differ from number \d"):
        cuts.read(tmp_path)


def test_every_faulty_reader_has_an_expectation():
    assert FOUND.keys() == faulty.TARGETS.keys()
    assert TARGETS.keys().isdisjoint(faulty.TARGETS)


class Scripted:
    """Worker with known outcomes: a finding for seed 3."""

    def __init__(self, folder):
        pass

    def attempt(self, target, seed):
        what = "bad\x1b[2J" if seed == 3 else None
        return {"what": what, "signature": "bad here" if what else "", "refused": seed % 2 == 0}

    def close(self):
        pass


def test_the_command_saves_findings_and_goes_on_where_it_ended(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "Worker", Scripted)
    arguments = ["--target", "npy", "--count", "5", "--folder", str(tmp_path / "out")]
    assert command.main(arguments) == 1
    printed = capsys.readouterr().out
    assert 'python -m tests.fuzz --target "npy" --seed 3 --count 1' in printed
    assert "\x1b" not in printed
    (saved,) = (tmp_path / "out" / "findings.jsonl").read_text().splitlines()
    assert json.loads(saved)["seed"] == 3
    assert json.loads(saved)["target"] == "npy"
    assert command.main(arguments) == 0  # seeds 5 to 9
    assert json.loads((tmp_path / "out" / "state.json").read_text())["npy"] == 10
    assert command.main([*arguments, "--seed", "3"]) == 1


def test_an_unknown_target_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--target", "nothing"])
    assert "'nothing'" in capsys.readouterr().err
