"""Tokenizing that is interrupted, killed or blocked, in real processes where it matters."""

import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxmodels.io.clean import main as clean
from jaxmodels.text import ByteVocabulary, TokenizerFile, encoding, partial, pieces
from jaxmodels.text.partial import Growing, fill, locked
from jaxmodels.text.sources import open_sources
from jaxmodels.text.tokens import end_ids, read, write_sources
from tests.jaxmodels.text.tokenizers import made
from tests.jaxmodels.tokenizer import byte_level_tokenizer
from tests.train_common import ROOT

TEXT = "Once upon a time, Ärger und 日本語。\r\nThere   was a <b>token</b> izer's text; it went on.\n"
SLOWLY = """
import sys
from jaxmodels.text import encoding, partial, pieces
encoding.BATCH, partial.SAVE_EVERY, pieces.PIECE = 200, 0.0, 50
from jaxmodels.training.tokenize import main
sys.exit(main())
"""

KILLED = """
import os, signal, sys
from pathlib import Path
from jaxmodels.text import ByteVocabulary, encoding, pieces
from jaxmodels.text.documents import TextFile
from jaxmodels.text.tokens import encode_whole, open_tokens
encoding.BATCH, pieces.PIECE = 200, 50
file, vocabulary, original, left = sys.argv[1], ByteVocabulary(), encoding.joined, [None] * 9
def joined(*arguments):
    if not left and {killed}:
        os.kill(os.getpid(), signal.SIGKILL)
    left[:1] = []
    return original(*arguments)
encoding.joined = joined
{call}
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


@pytest.mark.parametrize("call", ["open_tokens(file, vocabulary)", "encode_whole(TextFile(Path(file)), vocabulary)"])
@pytest.mark.parametrize("killed", [True, False])
def test_what_a_process_leaves_that_encodes_a_text_to_use_it_is_known_to_clean(call, killed, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT * 100)
    (tmp_path / "temporary").mkdir()
    command = [sys.executable, "-c", KILLED.format(call=call, killed=killed), str(tmp_path / "a.txt")]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == (-signal.SIGKILL if killed else 0), done.stderr
    left = list((tmp_path / "temporary").iterdir())
    assert len(left) == killed
    for path in [*left, *(path for folder in left for path in folder.iterdir())]:
        os.utime(path, (0, 0))
    assert clean([str(tmp_path / "temporary"), "--delete"]) == 0
    assert ("removed 1, " in capsys.readouterr().out) == killed
    assert not list((tmp_path / "temporary").iterdir())


def interrupted(folder, file, when, then):
    """Encode a file to a folder; after `when` batches do something."""
    batches, original = itertools.count(), encoding.batches

    def counted(found):
        for batch in original(found):
            if next(batches) == when:
                then()
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "batches", counted)
        return write_sources(folder, open_sources(str(file)), ByteVocabulary())


@pytest.mark.parametrize("name", ["a.txt", "docs/a.jsonl"])
@pytest.mark.parametrize("how", ["shorter", "longer", "other", "touched"])
def test_a_text_that_changes_while_it_is_encoded_is_refused(name, how, small, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    lines = json.dumps({"text": TEXT}) + "\n"
    file.write_text(lines * 30)
    changed = {"shorter": lines * 20, "longer": lines * 40, "other": lines.lower() * 30, "touched": lines * 30}[how]
    source = file if file.parent == tmp_path else file.parent
    with pytest.raises(ValueError, match=f"{file} has changed"):
        interrupted(tmp_path / "tokens", source, 2, lambda: file.write_text(changed))
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize(
    "change",
    [{"part": 1}, {"place": [0, 10**9, 0]}, {"place": [0, 2**80, 0]}, {"lengths": [[100, 2], [0, 0]]}, {"sha256": 1}],
)
def test_a_damaged_progress_begins_anew(change, small, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text((json.dumps({"text": TEXT}) + "\n") * 30)

    def stop():
        raise Interrupted

    with pytest.raises(Interrupted):
        interrupted(tmp_path / "tokens", file, 6, stop)
    (progress,) = tmp_path.glob(".tokens.*/progress.json")
    progress.write_text(json.dumps(json.loads(progress.read_text()) | change))
    tokens = write_sources(tmp_path / "tokens", open_sources(str(file)), ByteVocabulary())
    whole = np.concatenate([tokens.train, tokens.validation])
    assert bytes(whole.astype(np.uint8)) == (TEXT + "\n\n").encode() * 30


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
