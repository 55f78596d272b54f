"""Tokenizing that is interrupted, killed or blocked, in real processes where it matters."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxmodels.text import ByteVocabulary, TokenizerFile, encoding, partial, pieces
from jaxmodels.text.partial import Growing, fill, locked
from jaxmodels.text.sources import open_sources
from jaxmodels.text.tokens import end_ids, read, write_sources
from tests.jaxmodels.text.tokenizers import made
from tests.jaxmodels.tokenizer import byte_level_tokenizer

TEXT = "Once upon a time, Ärger und 日本語。\r\nThere   was a <b>token</b> izer's text; it went on.\n"
SLOWLY = """
import sys
from jaxmodels.text import encoding, partial, pieces
encoding.BATCH, partial.SAVE_EVERY, pieces.PIECE = 200, 0.0, 50
from jaxmodels.training.tokenize import main
sys.exit(main())
"""


class Interrupted(Exception):
    pass


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(encoding, "BATCH", 300)
    monkeypatch.setattr(pieces, "PIECE", 97)
    monkeypatch.setattr(partial, "SAVE_EVERY", 0.0)


def content(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.npy")}


@pytest.mark.parametrize("kind", ["text", "jsonl", "bytes"])
def test_work_that_is_interrupted_anywhere_ends_with_the_same_ids(kind, small, tmp_path):
    rng = random.Random(3)
    file = tmp_path / ("a.jsonl" if kind == "jsonl" else "a.txt")
    if kind == "jsonl":
        texts = [TEXT * rng.choice([1, 1, 2, 17]) for _ in range(23)]
        file.write_text("".join(json.dumps({"text": text}) + "\n\n" for text in texts))
    else:
        file.write_text(TEXT * 41, newline="")
    vocabulary = ByteVocabulary() if kind == "bytes" else TokenizerFile(made("pythia").to_str(), eos=(0,))
    sources = open_sources(str(file))
    end = end_ids(vocabulary, sources)
    (tmp_path / "whole").mkdir()
    fill(tmp_path / "whole", sources, vocabulary, end, key="a")
    whole = content(tmp_path / "whole")
    assert len(whole) == 4
    (tmp_path / "parts").mkdir()
    calls = 0

    def interrupt(read, total, about):
        nonlocal calls
        calls += 1
        assert 0 <= read <= total
        if rng.random() < 0.4:
            raise Interrupted

    for _ in range(200):
        try:
            fill(tmp_path / "parts", sources, vocabulary, end, key="a", report=interrupt)
            break
        except Interrupted:
            part = partial.PARTS[json.loads((tmp_path / "parts" / "progress.json").read_text())["part"]]
            with open(tmp_path / "parts" / f"{part}.npy", "ab") as torn:
                torn.write(b"\xff" * rng.randint(0, 9))  # what a killed process wrote after its last progress
    assert calls > 7
    assert content(tmp_path / "parts") == whole


def test_the_split_documents_are_whole(small, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": "x" * (i % 13 + 1)}) + "\n" for i in range(101)))
    vocabulary = ByteVocabulary()
    sources = open_sources(str(file))
    tokens = write_sources(tmp_path / "tokens", sources, vocabulary)
    assert tokens.documents == {"train": 90, "validation": 11}
    for ids, starts in ((tokens.train, tokens.train_documents), (tokens.validation, tokens.validation_documents)):
        assert starts[-1] == len(ids)
        assert all(bytes(ids[stop - 2 : stop]) == b"\n\n" for stop in starts[1:])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_documents_are_split(n, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "twenty characters..."}\n' * n)
    tokens = write_sources(tmp_path / "tokens", open_sources(str(tmp_path / "a.jsonl")), ByteVocabulary())
    assert len(tokens.train) + len(tokens.validation) == n * 22
    assert tokens.documents == {"train": max(1, n - 1), "validation": 1}
    assert read(tmp_path / "tokens").sha256 == tokens.sha256


def start(tmp_path, *flags):
    arguments = [sys.executable, "-c", SLOWLY, str(tmp_path / "a.txt"), str(tmp_path / "tokens"), *flags]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_progress(tmp_path, process):
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".tokens.*/progress.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that the killed one left open
def test_work_that_ends_before_any_file_is_shortened_ends_with_the_same_ids(small, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": TEXT * (i % 5)}) + "\n" for i in range(23)))
    sources, vocabulary = open_sources(str(tmp_path / "a.jsonl")), ByteVocabulary()
    assert sources.validation is None
    end = end_ids(vocabulary, sources)
    (tmp_path / "whole").mkdir()
    fill(tmp_path / "whole", sources, vocabulary, end, key="a")

    class Killed(io.FileIO):
        def truncate(self, size=None):
            left.append(size)
            if len(left) == last:
                raise Interrupted
            return super().truncate(size)

    opened = partial.open_in_place

    def killed(file):
        with opened(file) as raw:
            return Killed(os.dup(raw.fileno()), "r+b")

    monkeypatch.setattr(partial, "open_in_place", killed)
    for last in range(1, 30):
        left: list[int | None] = []
        folder = tmp_path / str(last)
        folder.mkdir()
        try:
            fill(folder, sources, vocabulary, end, key="a")
        except Interrupted:
            left += [None] * last  # the next process is not killed
            fill(folder, sources, vocabulary, end, key="a")
        else:
            assert last > 7
            break
        assert content(folder) == content(tmp_path / "whole"), last


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_killed_continues(how, tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    byte_level_tokenizer().save(str(tokenizer))
    (tmp_path / "a.txt").write_text(TEXT * 300, newline="")
    process = start(tmp_path, "--tokenizer", str(tokenizer))
    wait_for_progress(tmp_path, process)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    assert "Traceback" not in err
    assert not (tmp_path / "tokens").exists()
    (folder,) = tmp_path.glob(".tokens.*")
    before = json.loads((folder / "progress.json").read_text())
    assert before["lengths"][0][0] > 0
    again = start(tmp_path, "--tokenizer", str(tokenizer))
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert "continues" in err
    assert "tokens to train on" in out
    vocabulary = TokenizerFile.read(tokenizer)
    whole = TEXT * 300
    cut = int(0.9 * len(whole))
    tokens = read(tmp_path / "tokens")
    np.testing.assert_array_equal(tokens.train, vocabulary.encode(whole[:cut]))
    np.testing.assert_array_equal(tokens.validation, vocabulary.encode(whole[cut:]))
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "tokenizer.json", "tokens"]


def test_a_changed_text_begins_anew(small, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT * 20)
    vocabulary = ByteVocabulary()

    def stop(read, total, about):
        raise Interrupted

    folder = tmp_path / "parts"
    folder.mkdir()
    with pytest.raises(Interrupted):
        fill(folder, open_sources(str(tmp_path / "a.txt")), vocabulary, np.zeros(0, np.int32), key="a", report=stop)
    (tmp_path / "a.txt").write_text("other " * 300)
    fill(folder, open_sources(str(tmp_path / "a.txt")), vocabulary, np.zeros(0, np.int32), key="b")
    assert bytes(np.load(folder / "train.npy")) == ("other " * 300).encode()[:1620]


def test_two_processes_do_not_write_one_folder(tmp_path):
    refused = pytest.raises(ValueError, match=f"{tmp_path / 'a'} is being written by another")
    with locked(tmp_path / "a"), refused, locked(tmp_path / "a"):
        pass
    with locked(tmp_path / "a"):
        pass


def test_a_growing_file_is_a_npy_file(tmp_path):
    file = Growing(tmp_path / "a.npy", np.uint16)
    for n in (3, 0, 70_000):
        file.append(np.arange(n))
    file.close()
    np.testing.assert_array_equal(
        np.load(tmp_path / "a.npy"), np.concatenate([np.arange(3), np.arange(70_000)]) % 65536
    )
    again = Growing(tmp_path / "a.npy", np.uint16, 2)
    again.append(np.asarray([9]))
    again.close()
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 9]
