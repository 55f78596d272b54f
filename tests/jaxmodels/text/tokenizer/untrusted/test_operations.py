"""Tokenizers of others whose work takes for ever, swells or panics: one line that names the file, and no more."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxmodels.text import TokenizerFile
from jaxmodels.text.tokenizer import files as module
from tests.jaxmodels.text.tokenizer.untrusted.test_plain import MODEL, replace, sequence, split

WORDS = {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 0, " ": 1, "-": 2, "-" * 60: 3}}
SLOW = r"(?:-|-){22}~|-"
INSERTED = replace("(?<=a)", "a")
TEXTS = {
    "other characters": ({"pre_tokenizer": split(SLOW)}, "-" * 3_000),
    "a normalizer": ({"normalizer": replace(SLOW)}, "-" * 3_000),
    "all divisions of a word": ({"pre_tokenizer": split(r"(?:\w+\w?)+[.,]!")}, "a" * 100 + " .!"),
    "its own letters": ({"normalizer": replace("(?:ß+ß?)+[xy]")}, "ß" * 100),
    "steps that insert": ({"normalizer": sequence("normalizers", *[INSERTED] * 40)}, "a"),
    "bytes of bytes": (
        {
            "pre_tokenizer": sequence(
                "pretokenizers",
                *[{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}] * 40,
            )
        },
        "é",
    ),
    "Unicode and a rule": (
        {
            "normalizer": sequence(
                "normalizers", *[{"type": "NFKC"}, replace("ل", "\ufdfa", "String"), {"type": "Lowercase"}] * 20
            )
        },
        "\ufdfa" * 10,
    ),
}
IDS = {
    "slow": ({"model": WORDS, "decoder": replace(SLOW)}, [3] * 50),
    "inserted": ({"model": MODEL, "decoder": sequence("decoders", *[INSERTED] * 40)}, [0]),
    "between all characters": (
        {"model": MODEL, "decoder": sequence("decoders", *[{"type": "BPEDecoder", "suffix": ""}] * 40)},
        [0, 0, 0],
    ),
    "a panic": ({"model": MODEL, "decoder": {"type": "Strip", "content": " ", "start": 1, "stop": 1}}, [2]),
}


MORE = IDS.keys() - {"slow", "a panic"}


def written(folder, parts):
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({"version": "1.0", "model": MODEL, **parts}))
    return file


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.25)
    monkeypatch.setattr(module, "MEGABYTES", 200.0)


FAST = ("other characters", "its own letters", "steps that insert")


@pytest.mark.parametrize("what", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in TEXTS])
def test_a_text_that_cannot_be_encoded_is_one_line(what, tmp_path, capfd):
    parts, text = TEXTS[what]
    file, began = written(tmp_path, parts), time.monotonic()
    vocabulary = TokenizerFile.read(file)
    encoders = (vocabulary.encode, vocabulary.encode_prompt, lambda text: vocabulary.encode_batch([text]))
    for encode in encoders[: 1 if what in FAST else 3]:
        with pytest.raises(ValueError, match=rf"^tokenizer={file} cannot encode the text: .") as refused:
            encode(text)
        assert str(refused.value).isprintable()
    assert time.monotonic() - began < 30
    assert len(vocabulary.encode("b")) <= 1  # another process goes on
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "what", ["slow", "a panic", *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(MORE))]
)
def test_ids_that_cannot_be_decoded_are_one_line(what, tmp_path, capfd):
    parts, ids = IDS[what]
    file, began = written(tmp_path, parts), time.monotonic()
    vocabulary = TokenizerFile.read(file)
    with pytest.raises(ValueError, match=rf"^tokenizer={file} cannot decode these ids: .") as refused:
        vocabulary.decode(ids)
    assert str(refused.value).isprintable()
    assert time.monotonic() - began < 15
    assert vocabulary.decode(np.zeros(0, np.int32)) == ""
    assert capfd.readouterr() == ("", "")


def test_one_that_cannot_be_read_is_one_line(tmp_path, capfd):
    """Its normalizer fails with an added token, which the package takes for granted."""
    token = {"id": 0, "content": "ß" * 100, "special": False, "normalized": True}
    token |= {"single_word": False, "lstrip": False, "rstrip": False}
    file = written(tmp_path, {"normalizer": replace("(?:ß+ß?)+[xy]"), "added_tokens": [token]})
    with pytest.raises(ValueError, match=rf"^tokenizer={file} cannot be read: not a tokenizer.json: .") as refused:
        TokenizerFile.read(file)
    assert str(refused.value).isprintable()
    assert capfd.readouterr() == ("", "")


def tokenizing(text: Path, out: Path, tokenizer: Path) -> list[str]:
    """Command that tokenizes a text."""
    return [sys.executable, "-m", "jaxmodels", "tokenize", str(text), str(out), "--tokenizer", str(tokenizer)]


@pytest.mark.slow
def test_a_command_ends_with_one_line_and_leaves_no_process(tmp_path):
    file, text = written(tmp_path, {"pre_tokenizer": split(SLOW)}), tmp_path / "text.txt"
    text.write_text("a-" * 100 + "-" * 10_000)
    command = tokenizing(text, tmp_path / "out", file)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"LOST": str(tmp_path)}
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"python -m jaxmodels tokenize: {text}: tokenizer={file} cannot encode the text: it takes more than"
    )
    assert not (tmp_path / "out").exists()
    for process in os.listdir("/proc"):
        if process.isdecimal():
            try:
                assert str(tmp_path).encode() not in Path(f"/proc/{process}/environ").read_bytes()
            except OSError:
                continue


@pytest.mark.slow
def test_ctrl_c_ends_a_command_at_once(tmp_path):
    file, text = written(tmp_path, {"pre_tokenizer": split(SLOW)}), tmp_path / "text.txt"
    text.write_text("-" * 900_000)  # for which a process has 12 seconds
    command = tokenizing(text, tmp_path / "out", file)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".out.*")):
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "python -m jaxmodels tokenize: interrupted\n")
    assert time.monotonic() - began < 5
