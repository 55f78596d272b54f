"""Files of a chunk index that somebody else wrote: nothing is read that they do not own, nothing runs."""

import hashlib
import json
import struct
import zipfile

import numpy as np
import pytest

from jaxmodels.retro.retrieval import examples
from jaxmodels.retro.retrieval.command import main as neighbors_command
from jaxmodels.retro.retrieval.corpus import Corpus
from jaxmodels.retro.retrieval.embedders import BertMean, HashedNGrams
from jaxmodels.retro.retrieval.index import ChunkIndex
from jaxmodels.text import CharVocabulary

L = 5
TEXT = "".join(f"{i} men and {i * i % 89} women went to sea. " for i in range(23))
VOCABULARY = CharVocabulary.of(TEXT)


@pytest.fixture
def folder(tmp_path):
    ChunkIndex.build(tmp_path / "index", Corpus.of(VOCABULARY.encode(TEXT), VOCABULARY), L, HashedNGrams(64, 1, 3))
    return tmp_path / "index"


def change(folder, **fields):
    about = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(json.dumps(about | fields))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("index", "../elsewhere.faiss"),
        ("index", "index-0000000001.faiss.exe"),
        ("index", 3),
        ("index", None),
        ("chunk_len", 0),
        ("chunk_len", True),
        ("chunk_len", 5.0),
        ("chunks", -1),
        ("added", 10**9),
        ("embedder", ["ngrams"]),
        ("embedder", "sentence:" + "m" * 2**13),
        ("fingerprint", "0" * 10**6),
        ("fingerprint", None),
    ],
)
def test_a_field_that_build_does_not_write_is_refused(folder, field, value):
    change(folder, **{field: value})
    with pytest.raises(ValueError, match=f"{folder}.*{field}="):
        ChunkIndex.load(folder)


def test_a_file_outside_that_about_names_is_neither_read_nor_removed(folder, monkeypatch):
    victim = folder.parent / "index-0000000001.faiss"
    victim.write_text("mine")
    change(folder, index=f"../{victim.name}", added=1)
    with pytest.raises(ValueError, match="index="):
        ChunkIndex.build(folder, Corpus.of(VOCABULARY.encode(TEXT), VOCABULARY), L, HashedNGrams(64, 1, 3))
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("index", ["VICTIM", "../victim", "tokens.npy", ".", "", 5, True, ["VICTIM"], {"a": 1}])
def test_an_index_without_chunks_names_no_other_file_either(folder, index):
    victim = folder.parent / "victim"
    victim.write_text("mine")
    change(folder, added=0, sha256=None, index=str(victim) if index == "VICTIM" else index)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(ValueError, match=f"{folder}.*index="):
        ChunkIndex.build(folder, Corpus.of(VOCABULARY.encode(TEXT), VOCABULARY), L, HashedNGrams(64, 1, 3))
    assert victim.read_text() == "mine"
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    "name",
    [
        "tokens.npy",
        "documents.npy",
        "vocabulary.json",
        "training.npz",
        "validation_nearest.npz",
        "index-0000000001.faiss",
    ],
)
def test_a_file_of_others_in_the_folder_is_neither_replaced_nor_removed(folder, name):
    corpus = Corpus.of(VOCABULARY.encode(TEXT), VOCABULARY)
    change(folder, added=0)
    ChunkIndex.build(folder, corpus, L, HashedNGrams(64, 1, 3))  # builds it again
    (folder / name).write_text("mine")
    for fields in ({}, {"added": 0}):
        change(folder, **fields)
        with pytest.raises(ValueError, match=f"{name} was not written by this program"):
            ChunkIndex.build(folder, corpus, L, HashedNGrams(64, 1, 3))
        assert (folder / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["bert:someone/remote", "sentence:someone/remote"])
def test_an_embedder_that_loads_a_model_must_be_named_by_the_caller(folder, name, monkeypatch, capsys):
    corpus = Corpus.of(VOCABULARY.encode(TEXT), VOCABULARY)
    change(folder, embedder=name, fingerprint=corpus.fingerprint(L, name))
    monkeypatch.setattr("socket.socket", lambda *args, **kwargs: pytest.fail("a network was used"))
    with pytest.raises(ValueError, match=f"{name}.*embedder="):
        ChunkIndex.load(folder)
    assert neighbors_command([str(folder), "--prompt", TEXT[:9]]) == 2
    assert "--embedder" in capsys.readouterr().err


def test_an_embedder_that_the_caller_names_is_used(folder, monkeypatch):
    corpus = Corpus.of(VOCABULARY.encode(TEXT), VOCABULARY)
    change(folder, embedder="bert:local", fingerprint=corpus.fingerprint(L, "bert:local"))
    monkeypatch.setattr(BertMean, "width", 64)
    assert len(ChunkIndex.load(folder, embedder=BertMean("local"))) == len(corpus.chunks(L))


def test_every_changed_byte_of_the_search_file_is_noticed_before_faiss_reads_it(folder, monkeypatch):
    faiss = pytest.importorskip("faiss")
    file = next(folder.glob("*.faiss"))
    whole = bytearray(file.read_bytes())
    monkeypatch.setattr(faiss, "read_index", lambda *given: pytest.fail("FAISS read a damaged file"))
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(whole), 23):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{file}.*sha256"):
            ChunkIndex.load(folder)


def test_an_index_of_another_width_or_of_more_chunks_is_refused(folder):
    faiss = pytest.importorskip("faiss")
    about = json.loads((folder / "about.json").read_text())
    file = folder / about["index"]
    for width, n, match in ((63, about["added"], "width 63"), (64, about["added"] + 1, "chunks")):
        other = faiss.IndexFlatIP(width)
        other.add(np.zeros((n, width), np.float32))
        faiss.write_index(other, str(file))
        change(folder, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
        with pytest.raises(ValueError, match=match):
            ChunkIndex.load(folder)


@pytest.mark.parametrize("high", [len(VOCABULARY), 2**31 - 1])
def test_tokens_outside_the_vocabulary_are_refused(folder, high):
    tokens = VOCABULARY.encode(TEXT).astype(np.int64)
    tokens[7] = high
    np.save(folder / "tokens.npy", tokens)
    with pytest.raises(ValueError, match=f"{high}.*{len(VOCABULARY) - 1}"):
        ChunkIndex.load(folder)


@pytest.mark.parametrize(
    "documents", [np.array([0]), np.array([], int), np.array([[0, 9]]), np.array([0.0, 9.0]), np.array([0, 7])]
)
def test_documents_that_do_not_cover_the_tokens_are_refused(folder, documents):
    np.save(folder / "documents.npy", documents)
    with pytest.raises(ValueError, match="documents"):
        ChunkIndex.load(folder)


def test_pickled_arrays_are_refused(folder):
    np.save(folder / "tokens.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match=str(folder)):
        ChunkIndex.load(folder)


def test_no_error_advises_to_allow_pickles(folder):
    header = b"{'descr': '<i4', 'fortran_order': False, 'shape': (" + b"1, " * 10_000 + b")}\n"
    (folder / "tokens.npy").write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header)) + header)
    with pytest.raises(ValueError, match=r"tokens\.npy is not a \.npy file of numbers: ") as refused:
        ChunkIndex.load(folder)
    assert "To allow" not in str(refused.value)


def test_saved_neighbors_of_another_size_are_looked_up_again(tmp_path):
    file, shape = tmp_path / "neighbors.npz", (3, 2, 5)
    np.savez(file, fingerprint="f", neighbors=np.arange(30, dtype=np.int32).reshape(shape))
    np.testing.assert_array_equal(examples.read(file, "f", shape), np.arange(30).reshape(shape))
    for other in (np.zeros((3, 2, 4), np.int32), np.zeros(shape, np.int64)):
        np.savez(file, fingerprint="f", neighbors=other)
        assert examples.read(file, "f", shape) is None
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("fingerprint.npy", b"")
        archive.writestr("neighbors.npy", bytes(10_000_000))
    assert examples.read(file, "f", shape) is None
