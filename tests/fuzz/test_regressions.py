"""Files that the fuzzers found, made anew: each is refused with one line that names a file."""

import json
import os
import time
import zipfile

import numpy as np
import pytest

from jaxmodels.io.bounded import sha256_of
from jaxmodels.text import TokenizerFile
from tests.fuzz.judge import memory, peak_reset
from tests.fuzz.targets import TARGETS
from tests.fuzz.targets.retro import seal

TERABYTE = 10**12


def sparse(name):
    """Change that makes a file a terabyte of zeros, which takes no room on a disk."""

    def change(folder):
        (folder / name).unlink(missing_ok=True)
        with (folder / name).open("wb") as opened:
            opened.truncate(TERABYTE)

    return change


def text(name, content):
    """Change that gives a file another content."""
    return lambda folder: (folder / name).write_bytes(content.encode("utf-8", "surrogatepass"))


def field(name, **values):
    """Change of top-level fields of a JSON file."""

    def change(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return change


def array(name, header):
    """Change that makes a .npy file of a header alone."""

    def change(folder):
        padded = header.encode().ljust(117) + b"\n"
        (folder / name).write_bytes(b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded)

    return change


def sealed_faiss(old, new):
    """Change of a number in FAISS's file, with the checksum in about.json that fits."""

    def change(folder):
        (file,) = (folder / "index").glob("*.faiss")
        content = file.read_bytes()
        at = content.index(old.to_bytes(8, "little"))
        file.write_bytes(content[:at] + new.to_bytes(8, "little") + content[at + 8 :])
        field("index/about.json", sha256=sha256_of(file))(folder)

    return change


def sealed_about(**values):
    """Change of fields of about.json, with the fingerprint that fits."""

    def change(folder):
        field("index/about.json", **values)(folder)
        seal(folder)

    return change


NO_BYTES = "{'descr': '|V0', 'fortran_order': False, 'shape': (1000000000000000000,), }"
NO_TEXT = "{'descr': '|S0', 'fortran_order': False, 'shape': (1000000000000,), }"
VOCAB, ADDED, CONFIG = "vocab.json and merges.txt", "added_tokens.json", "tokenizer_config.json"
FAISS = "index/index-0000000042.faiss"
LINES = '{"step": 1, "loss": 2.5}\n'
NUMBERS = 42 * 16  # of the vectors in FAISS's file
# Target, change, and what the error says.
CASES = {
    "elements without bytes": ("npy", array("array.npy", NO_BYTES), "array.npy"),
    "strings without bytes": ("npy", array("array.npy", NO_TEXT), "array.npy"),
    "damaged tokenizer inside": ("vocabularies", text("tokens.json", '{"tokenizer": "{}"}'), "tokens.json"),
    "infinite id": (VOCAB, text(ADDED, '{"a": 1e400}'), ADDED),
    "id is a text": (VOCAB, text(ADDED, '{"a": "x"}'), ADDED),
    "added tokens are a list": (VOCAB, field(CONFIG, added_tokens_decoder=[1]), CONFIG),
    "merges without end": (VOCAB, sparse("merges.txt"), "merges.txt has 1,000,000,000,000 bytes"),
    "special token is no Unicode": ("tokenizer", field(CONFIG, eos_token="\ud800"), CONFIG),
    "chunk_len beyond 64 bits": ("chunk index's JSON", field("index/about.json", chunk_len=2**64), "index"),
    "n-grams of no length": (
        "chunk index's JSON",
        sealed_about(embedder="ngrams:16:9:2"),
        "index: width=16, shortest=9",
    ),
    "FAISS file without end": ("FAISS, flat", sparse(FAISS), "1,000,000,000,000 bytes"),
    "FAISS length of a gigabyte": ("FAISS, flat", sealed_faiss(NUMBERS, 2**28), "cannot be read"),
    "state without end": ("mutation state", sparse("state.jsonl"), "state.jsonl"),
    "state is not UTF-8": ("mutation state", text("state.jsonl", "\ud800"), "state.jsonl"),
    "layout of a megabyte": ("settings", text("layouts.txt", "o " * 500_000), "has 1,000,000 characters"),
    "bias of a megabyte": ("settings", text("biases.txt", "1" * 10**6), "characters left out"),
}
BAD_LINES = ("1e400", "[]", '{"loss": 1.0}', '{"step": "a", "loss": 1}', '{"step": 1, "loss": "a"}')


ODD = "\x9b31m\r\n\b"


def renamed(file):
    """Change of a tensor's name in an index to one that would be several lines on a terminal."""

    def change(folder):
        content = json.loads((folder / file).read_text())
        content["weight_map"][ODD] = content["weight_map"].pop(next(iter(content["weight_map"])))
        (folder / file).write_text(json.dumps(content))

    return change


CASES |= {
    "a tensor's name of several lines": ("model, streamed", renamed("params.safetensors.index.json"), "x9b31m"),
    "a rule's name of several lines": (
        "tokenizer",
        text("tokenizer.json", json.dumps({"normalizer": {"type": ODD}})),
        "j",
    ),
    "a file's name of several lines": (
        "Hugging Face, in parts",
        field("model.safetensors.index.json", weight_map={"a": ODD}),
        "index.json names",
    ),
    "a text without end": ("documents", sparse("text.txt"), "text.txt has 1,000,000,000,000 bytes"),
}


def fifo(name):
    """Change that makes a file one that is waited for without end."""

    def change(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def written(name, content):
    """Change that replaces the content of a file."""
    return lambda folder: (folder / name).write_bytes(content)


ORBAX = "params/state/array_metadatas/process_0"
NESTED = b'{"a": ' * 100_000 + b"1" + b"}" * 100_000
CASES |= {
    "a FIFO in Orbax's folder": ("model", fifo(ORBAX), "process_0 is a FIFO; expected a regular file"),
    "nested places of arrays": ("model", written("params/state/_sharding", NESTED), "_sharding is not read: its lists"),
    "metadata of arrays that are no JSON": ("model", written(ORBAX, b"ID"), "process_0 is not JSON"),
    "metadata without end": ("model", sparse("params/state/_METADATA"), "_METADATA has 1,000,000,000,000 bytes"),
}

MODULE = "sentence_transformers.models.Transformer"
CASES |= {
    "a module that is no object": ("embedder's JSON", text("model/modules.json", json.dumps([MODULE])), "modules.json"),
    "an embedder's configuration of many lists": (
        "embedder's JSON",
        field("model/config.json", attention_probs_dropout_prob=[[]] * 300_000),
        "config.json has more than 100,000 values",
    ),
    "a length of lists": (
        "transformer's config.json",
        lambda folder: config_field(folder, max_len=[[]] * 300_000),
        "config has more than 10,000 values",
    ),
    "a length of many numbers": (
        "transformer's config.json",
        lambda folder: config_field(folder, max_len=[1] * 300_000),
        "config has more than 10,000 values",
    ),
    "a length that is a list": (
        "transformer's config.json",
        lambda folder: config_field(folder, max_len=[[7]]),
        "max_len=[[7]] must be an integer",
    ),
    "a setting's name of several lines": (
        "model, streamed",
        lambda folder: config_field(folder, **{ODD: 1}),
        "x9b31m",
    ),
    "layers that are not stored": (
        "retro's config.json",
        lambda folder: config_field(folder, n_layers=500),
        "describes a model of more than",
    ),
}


def config_field(folder, **values):
    """Change arguments of the model in config.json."""
    content = json.loads((folder / "config.json").read_text())
    content["config"] |= values
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused(tmp_path, case):
    name, change, said = CASES[case]
    target = TARGETS[name]
    target.make(tmp_path)
    change(tmp_path)
    peak_reset()
    began, resident = time.process_time(), memory("VmRSS")
    with pytest.raises((ValueError, OSError)) as refused:
        target.read(tmp_path)
    assert time.process_time() - began < 5
    assert memory("VmHWM") - resident < 1e9
    assert said in str(refused.value)
    assert len(str(refused.value)) < 5_000
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    "line",
    [
        "1e400",
        "[]",
        '{"loss": 1.0}',
        '{"step": "a", "loss": 1}',
        '{"step": 1, "loss": "a"}',
        '{"step": 1, "x": [NaN]}',
        '{"step": 0, "x": {}}',
    ],
)
def test_a_line_of_metrics_is_an_object_with_numbers(tmp_path, line):
    from jaxmodels.training import metrics

    (tmp_path / "metrics.jsonl").write_text(f"{LINES}{line}\n{LINES}")
    for read in (metrics.read, lambda run: metrics.Log(run, [2.0])):
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
            read(tmp_path)


def test_lines_of_metrics_that_a_kill_cut_are_left_out(tmp_path):
    from jaxmodels.training import metrics

    (tmp_path / "metrics.jsonl").write_text(f'{LINES}{{"step": 2, "lo\n{{"step": 3, "loss": NaN}}\n{{"step')
    assert [line["step"] for line in metrics.read(tmp_path)] == [1, 3]


def test_metrics_are_read_line_by_line(tmp_path):
    """A million lines that a run does not have are not kept; a line without end is refused."""
    from jaxmodels.training import metrics

    (tmp_path / "metrics.jsonl").write_text(
        f"{LINES}" + '{"step": 9, "loss": 1.5, "note": "xxxxxxxxxxxxxxxx"}\n' * 200_000
    )
    peak_reset()
    resident = memory("VmRSS")
    assert metrics.Log.lines_until(tmp_path, [2.0]) == ['{"step": 1, "loss": 2.0}\n']
    assert memory("VmHWM") - resident < 2e7
    (tmp_path / "metrics.jsonl").write_text(LINES + "x" * 70_000)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, has more than 65,536 bytes"):
        metrics.read(tmp_path)
    sparse("metrics.jsonl")(tmp_path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl has 1,000,000,000,000 bytes"):
        metrics.Log.lines_until(tmp_path, [2.0])


def test_metrics_of_a_step_are_bounded(tmp_path):
    """Lines that a resumed run keeps take no more memory than their file, and there is one evaluation of a step."""
    from jaxmodels.training import metrics

    fields = ", ".join(f'"{i}": 0' for i in range(5_000))
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {i}, {fields}}}\n' for i in range(300)))
    size = (tmp_path / "metrics.jsonl").stat().st_size
    peak_reset()
    resident = memory("VmRSS")
    assert len(metrics.Log.lines_until(tmp_path, [2.0] * 300)) == 600
    assert memory("VmHWM") - resident < 2 * size + 2e7
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "x": 1}\n' * 101)
    assert len(metrics.Log.lines_until(tmp_path, [2.0])) == 2


def test_a_state_that_is_a_link_is_not_written_to(tmp_path):
    from parity.mutation.state import State

    (tmp_path / "mine").write_text("")
    (tmp_path / "state.jsonl").symlink_to("mine")
    with pytest.raises(ValueError, match=r"state\.jsonl is a symbolic link"), State.opened(tmp_path / "state.jsonl"):
        pass
    assert (tmp_path / "mine").read_text() == ""


@pytest.mark.parametrize("shape", ["(30000000000,)", "((", "None"])
def test_neighbors_with_a_damaged_header_are_not_read(tmp_path, shape):
    make = TARGETS["neighbors kept"].make
    make(tmp_path)
    content = (tmp_path / "train.npz").read_bytes()
    assert content.count(b"(3, 2, 5)") == 1
    (tmp_path / "train.npz").write_bytes(content.replace(b"(3, 2, 5)", shape.encode().ljust(9)[:9]))
    assert TARGETS["neighbors kept"].read(tmp_path) is None


def test_neighbors_that_are_no_array_are_not_read(tmp_path):
    TARGETS["neighbors kept"].make(tmp_path)
    with zipfile.ZipFile(tmp_path / "train.npz") as old:
        entries = {name: old.read(name) for name in old.namelist()} | {"neighbors.npy": b"no array"}
    with zipfile.ZipFile(tmp_path / "train.npz", "w") as new:
        for name, content in entries.items():
            new.writestr(name, content)
    assert TARGETS["neighbors kept"].read(tmp_path) is None


def test_neighbors_without_end_are_not_read(tmp_path):
    sparse("train.npz")(tmp_path)
    assert TARGETS["neighbors kept"].read(tmp_path) is None
    (tmp_path / "train.npz").unlink()
    os.mkfifo(tmp_path / "train.npz")
    assert TARGETS["neighbors kept"].read(tmp_path) is None


def test_a_file_beside_the_weights_without_end_is_not_copied(tmp_path):
    from jaxmodels.convert.companions import Companions

    sparse("vocab.txt")(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"vocab\.txt has 1,000,000,000,000 bytes"):
        Companions.of(tmp_path).write(tmp_path / "out")


@pytest.mark.parametrize("value", [10**30, "9" * 5_000, 0.5, [], 2**31])
def test_an_id_of_a_special_token_has_31_bits(tmp_path, value):
    from jaxmodels.convert.companions import Companions

    (tmp_path / "generation_config.json").write_text(json.dumps({"bos_token_id": value}))
    with pytest.raises(ValueError, match="bos_token_id") as refused:
        Companions.of(tmp_path)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("value", [2**24 + 1, 2**31 - 1])
def test_an_id_of_a_vocabulary_takes_no_memory_for_those_below(tmp_path, value):
    """The tokenizers package lists all ids up to the largest when it writes a vocabulary."""
    TARGETS["vocab.json and merges.txt"].make(tmp_path)
    (file,) = tmp_path.rglob("vocab.json")
    vocabulary = json.loads(file.read_text())
    file.write_text(json.dumps(vocabulary | {next(iter(vocabulary)): value}))
    with pytest.raises(ValueError, match=rf"vocab\.json.*{value}"):
        TokenizerFile.read(file)


@pytest.mark.filterwarnings("ignore:.*rows without a text are left out:UserWarning")
@pytest.mark.parametrize("offset", [2**30, -(2**30)])
def test_an_arrow_file_with_strings_outside_of_it_is_refused(tmp_path, offset):
    """It would be read as memory of the process, or end it."""
    TARGETS["sources, Arrow"].make(tmp_path)
    file = tmp_path / "arrow" / "a.arrow"
    content = file.read_bytes()
    at = content.index(np.array([0, 5, 11], np.int32).tobytes()) + 4
    file.write_bytes(content[:at] + np.int32(offset).tobytes() + content[at + 4 :])
    with pytest.raises(ValueError, match=r"a\.arrow is not a readable Arrow file"):
        TARGETS["sources, Arrow"].read(tmp_path)


def test_a_parquet_file_that_repeats_a_text_is_not_read_to_its_end(tmp_path, monkeypatch):
    """A thousand bytes may stand for any number of megabytes."""
    import pyarrow
    from pyarrow import parquet

    from jaxmodels.text import documents
    from jaxmodels.text.tables import columns

    monkeypatch.setattr(columns, "LEAST_SUM", 10**6)
    repeated = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1_000, pyarrow.int32()), ["a" * 10**4])
    parquet.write_table(pyarrow.table({"text": repeated}), tmp_path / "a.parquet", compression="zstd")
    rows = documents.Files("a", (tmp_path / "a.parquet",)).documents()
    with pytest.raises(ValueError, match=r"a\.parquet holds more than 1,000 times as much text"):
        list(rows)


def test_a_panic_of_the_tokenizer_is_refused(monkeypatch):
    """The package is written in Rust, whose panics are no Exceptions."""

    class PanicException(BaseException):
        pass

    class Panics:
        def encode(self, text, **settings):
            raise PanicException("index out of bounds\nnote: run with RUST_BACKTRACE=1")

    vocabulary = TokenizerFile("{}")
    vocabulary.__dict__.update(tokenizer=Panics(), confined=None)
    with pytest.raises(ValueError, match=r"^the tokenizer cannot encode the text: index out of bounds$"):
        vocabulary.encode("abc")


def test_a_model_that_is_not_registered_names_the_file(tmp_path):
    import jaxmodels

    (tmp_path / "params").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"format": 1, "model": "b" * 10**6, "config": {}}))
    with pytest.raises(ValueError, match=r"config\.json: model=.*is not registered") as refused:
        jaxmodels.load(tmp_path)
    assert len(str(refused.value)) < 1_000


def test_examples_keep_what_the_changes_refer_to(tmp_path):
    """The changes above would otherwise be refused for another reason."""
    for name in ("chunk index", "vocab.json and merges.txt", "settings", "mutation state"):
        folder = tmp_path / name
        folder.mkdir()
        TARGETS[name].make(folder)
        TARGETS[name].read(folder)
    assert (tmp_path / "chunk index" / "index" / "index-0000000042.faiss").is_file()
    assert np.load(tmp_path / "chunk index" / "index" / "documents.npy").tolist() == [0, 210]
