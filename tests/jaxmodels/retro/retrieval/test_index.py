"""ChunkIndex: nearest neighbors, excluded passages, files, errors."""

import json
import re
import shutil

import numpy as np
import pytest

from jaxmodels.io.bounded import exclusive
from jaxmodels.retro.retrieval import index as index_module
from jaxmodels.retro.retrieval.command import main as neighbors_command
from jaxmodels.retro.retrieval.corpus import Corpus, sharing
from jaxmodels.retro.retrieval.embedders import HashedNGrams
from jaxmodels.retro.retrieval.index import ChunkIndex
from jaxmodels.text import CharVocabulary

L = 5
TEXT = "".join(f"{i} men and {i * i % 89} women went to sea [in a boat]. " for i in range(61))
VOCABULARY = CharVocabulary.of(TEXT)
NGRAMS = HashedNGrams(64, 1, 3)


def corpus(text: str = TEXT, documents=None) -> Corpus:
    return Corpus.of(VOCABULARY.encode(text), VOCABULARY, documents)


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> ChunkIndex:
    return ChunkIndex.build(tmp_path_factory.mktemp("index") / "index", corpus(), L, NGRAMS)


def nearest_by_hand(index: ChunkIndex, chunks: np.ndarray, allowed: np.ndarray, k: int) -> np.ndarray:
    """The similarities of the k best allowed chunks of each row, best first."""
    similarity = index.embed(chunks) @ index.embed(index.corpus.passages(index.starts, L)).T
    return -np.sort(-np.where(allowed, similarity, -np.inf), axis=1)[:, :k]


def similarities(index: ChunkIndex, chunks: np.ndarray, found: np.ndarray) -> np.ndarray:
    vectors = index.embed(index.corpus.passages(found.reshape(-1), L)).reshape(*found.shape, -1)
    return np.einsum("nd,nkd->nk", index.embed(chunks), vectors)


def test_neighbors_are_the_nearest_outside_their_own_span(index):
    places = np.arange(3, 200, 7)
    chunks = index.corpus.passages(places, L)
    own = np.stack([places - 4, places + 13], axis=1)
    found = index.neighbors(chunks, 3, own=own)
    assert found.shape == (len(places), 3)
    assert ((found + 2 * L <= own[:, :1]) | (found >= own[:, 1:])).all()
    allowed = (index.starts + 2 * L <= own[:, :1]) | (index.starts >= own[:, 1:])
    expected = nearest_by_hand(index, chunks, allowed, 3)
    np.testing.assert_allclose(similarities(index, chunks, found), expected, atol=1e-5)


def test_a_chunk_of_the_corpus_finds_itself_and_its_continuation(index):
    start = int(index.starts[7])
    chunk = index.corpus.passages(np.array([start]), L)
    found = index.neighbors(chunk, 1)[0]
    passage = index.corpus.passages(found, 2 * L)[0]
    np.testing.assert_array_equal(passage[:L], chunk[0])
    assert VOCABULARY.decode(passage) == TEXT[found[0] : found[0] + 2 * L]


@pytest.mark.parametrize("run", [4, 7])
def test_passages_that_share_a_run_are_refused_and_others_found(index, run):
    places = np.arange(0, 300, 11)
    texts = index.corpus.passages(places, 2 * L)
    refuse = sharing(index.corpus, texts, run, 2 * L)
    rows = np.arange(len(places))
    candidates = np.broadcast_to(index.starts[::9], (len(rows), len(index.starts[::9])))
    expected = [
        [
            any(TEXT[p : p + 2 * L][i : i + run] in TEXT[s : s + 2 * L] for i in range(2 * L - run + 1))
            for s in candidates[0]
        ]
        for p in places
    ]
    np.testing.assert_array_equal(refuse(rows, candidates), expected)
    assert 0.05 < np.mean(expected) < 0.95
    found = index.neighbors(texts[:, :L], 2, refuse=refuse)
    assert not (refuse(rows, np.maximum(found, 0)) & (found >= 0)).any()


def test_always_k_repeated_where_the_corpus_has_fewer_and_none_where_it_has_none(tmp_path):
    index = ChunkIndex.build(tmp_path / "index", corpus(TEXT[: 3 * L]), L, NGRAMS)
    chunk = index.corpus.passages(np.array([0]), L)
    assert len(set(index.neighbors(chunk, 3)[0])) == 3
    found = index.neighbors(chunk, 5)[0]
    assert set(found) == set(index.starts)
    assert (found[3:] == found[0]).all()
    np.testing.assert_array_equal(index.neighbors(chunk, 2, own=np.array([[0, 3 * L]])), [[-1, -1]])
    np.testing.assert_array_equal(index.corpus.passages(np.array([-1]), 2 * L), np.zeros((1, 2 * L)))


def test_chunks_are_those_of_each_document():
    rng = np.random.default_rng(0)
    for length in (1, 3, 7):
        starts = [0, *np.sort(rng.choice(np.arange(1, 997), 83, replace=False)).tolist()]
        found = Corpus.of(np.zeros(997, np.uint8), VOCABULARY, starts).chunks(length)
        ends = [*starts[1:], 997]
        expected = [at for a, b in zip(starts, ends, strict=True) for at in range(a, b - length + 1, length)]
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == np.int64


def test_documents_are_cut_and_continued_by_themselves(tmp_path):
    documents = corpus(TEXT[:31], [0, 12, 16])  # of 12, 4 and 15 tokens
    np.testing.assert_array_equal(documents.chunks(L), [0, 5, 16, 21, 26])
    passage = documents.passages(np.array([5, 26, 16]), 2 * L)
    np.testing.assert_array_equal(passage[0], [*VOCABULARY.encode(TEXT[5:12]), 0, 0, 0])
    np.testing.assert_array_equal(passage[1], [*VOCABULARY.encode(TEXT[26:31]), 0, 0, 0, 0, 0])
    assert documents.text(5, 2 * L) == TEXT[5:12]
    index = ChunkIndex.build(tmp_path / "index", documents, L, NGRAMS)
    np.testing.assert_array_equal(ChunkIndex.load(tmp_path / "index").corpus.documents, [0, 12, 16, 31])
    assert len(index) == 5


def test_a_stopped_build_goes_on_after_what_was_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "BATCH", 40)
    monkeypatch.setattr(index_module, "SAVE_EVERY", 2)
    calls = []

    class Stopping(HashedNGrams):
        def embed(self, texts):
            calls.append(len(texts))
            if len(calls) == 6:
                raise KeyboardInterrupt
            return super().embed(texts)

    folder = tmp_path / "index"
    with pytest.raises(KeyboardInterrupt):
        ChunkIndex.build(folder, corpus(), L, Stopping(64, 1, 3))
    with pytest.raises(ValueError, match=r"\b160 of \d+ chunks"):
        ChunkIndex.load(folder)
    calls.clear()
    calls.extend([0] * 6)
    again = ChunkIndex.build(folder, corpus(), L, Stopping(64, 1, 3))
    assert sum(calls) == len(again) - 160
    whole = ChunkIndex.build(tmp_path / "whole", corpus(), L, NGRAMS)
    chunks = again.corpus.passages(np.arange(2, 90, 3), L)
    np.testing.assert_array_equal(again.neighbors(chunks, 2), whole.neighbors(chunks, 2))
    calls.clear()
    loaded = ChunkIndex.build(folder, corpus(), L, Stopping(64, 1, 3))  # reused: nothing is embedded
    assert (calls, len(loaded)) == ([], len(again))
    assert [file.name for file in folder.glob("*.faiss")] == [f"index-{len(again):010}.faiss"]


def test_one_process_at_a_time_builds_and_any_opens_what_is_finished(tmp_path, monkeypatch):
    """The second one would remove the file that the first has just written, as superseded."""
    monkeypatch.setattr(index_module, "BATCH", 40)
    monkeypatch.setattr(index_module, "SAVE_EVERY", 1)
    folder, refused = tmp_path / "index", []

    class Twice(HashedNGrams):
        def embed(self, texts):
            with pytest.raises(ValueError, match="index is being written by another process"):
                ChunkIndex.build(folder, corpus(), L, NGRAMS)
            refused.append(len(texts))
            return super().embed(texts)

    whole = ChunkIndex.build(folder, corpus(), L, Twice(64, 1, 3))
    assert sum(refused) == len(whole)
    with exclusive(folder / ".lock"):
        assert len(ChunkIndex.build(folder, corpus(), L, NGRAMS)) == len(whole)


def test_an_interrupted_build_keeps_what_it_has_added_and_a_look_up_ends(tmp_path, index, monkeypatch):
    monkeypatch.setattr(index_module, "BATCH", 40)
    asked = iter([False, True])
    with pytest.raises(KeyboardInterrupt):
        ChunkIndex.build(tmp_path / "index", corpus(), L, NGRAMS, interrupted=lambda: next(asked))
    assert index_module.read_about(tmp_path / "index")["added"] == 80
    assert [file.name for file in (tmp_path / "index").glob(".*")] == [".lock"]
    assert len(ChunkIndex.build(tmp_path / "index", corpus(), L, NGRAMS)) == len(index)
    asked = iter([False, True])
    with pytest.raises(KeyboardInterrupt):
        index.neighbors(index.corpus.passages(index.starts, L), interrupted=lambda: next(asked))


@pytest.mark.slow
def test_inverted_lists_of_quantized_vectors_find_most_of_the_nearest(tmp_path, index):
    rough = ChunkIndex.build(tmp_path / "index", corpus(), L, NGRAMS, factory="IVF4,PQ32x4")
    chunks = index.corpus.passages(np.arange(1, 900, 13), L)
    exact, found = index.neighbors(chunks, 2), rough.neighbors(chunks, 2)
    assert (found >= 0).all()
    best = similarities(index, chunks, exact)[:, 0]
    assert (similarities(index, chunks, found).max(axis=1) > best - 0.2).mean() > 0.6
    rough.n_probe = 1  # most chunks are not even looked at: FAISS says -1
    found = rough.neighbors(chunks, len(index))
    assert (found[:, -1] == found[:, 0]).all()


OTHERS = {
    "another corpus": (
        lambda folder: ChunkIndex.load(folder, corpus=corpus(TEXT[1:])),
        "another corpus",
    ),
    "chunk_len": (lambda folder: ChunkIndex.load(folder, chunk_len=6), r"chunk_len=5\b.*chunk_len=6\b"),
    "embedder": (
        lambda folder: ChunkIndex.load(folder, embedder=HashedNGrams()),
        "embedder=ngrams:64:1:3.*embedder=",
    ),
    "factory": (lambda folder: build(folder, factory="IVF4,Flat"), "factory=Flat.*factory=IVF4"),
    "no index": (lambda folder: build(folder.parent), "chunk index"),
    "nothing": (lambda folder: ChunkIndex.load(folder.parent), "chunk index"),
}
REFUSED = {
    "factory": (lambda index, folder: build(folder / "new", factory="Sideways"), "factory='Sideways'"),
    "few": (lambda index, folder: build(folder / "few", factory="PQ8x12"), "factory='PQ8x12'"),
    "many cells": (lambda index, folder: build(folder / "a", factory="IVF1000000000,Flat"), "'IVF1000000000', must be"),
    "many features": (lambda index, folder: build(folder / "a", factory="RR1048576,Flat"), "'RR1048576', must be"),
    "many parts": (lambda index, folder: build(folder / "a", factory="OPQ8_4096,PQ8"), "'_4096', must be at most 64"),
    "a slow kind": (lambda index, folder: build(folder / "a", factory="LSQ8x8"), "factory='LSQ8x8' has 'LSQ8x8'"),
    "a nested index": (lambda index, folder: build(folder / "a", factory="IVF4(RQ9x8),Flat"), r"has 'IVF4\(RQ9x8\)'"),
    "many links": (lambda index, folder: build(folder / "a", factory="HNSW1000000"), "'HNSW1000000', must be"),
    "many bits": (lambda index, folder: build(folder / "a", factory="PQ8x24"), r"'x24', must be at most 16"),
    "short": (lambda index, folder: build(folder / "new", corpus("men")), r"chunk_len=5\b.*\b3\b"),
    "empty": (lambda index, folder: corpus(""), r"^tokens .*\[0\]"),
    "documents": (lambda index, folder: corpus(TEXT, [0, 9, 9]), r"documents=\[0, 9, 9\]"),
    "first": (lambda index, folder: corpus(TEXT, [3]), r"documents=\[3\]"),
    "chunk_len": (lambda index, folder: index.corpus.chunks(0), "chunk_len=0"),
    "behind": (lambda index, folder: index.corpus.passages(np.array([len(TEXT)]), 3), f"0 to {len(TEXT) - 1}"),
    "before": (lambda index, folder: index.corpus.passages(np.array([-2]), 3), r"-2 .*0 to \d+"),
    "width": (lambda index, folder: index.neighbors(np.zeros((3, L + 1), int)), r"\[3, 6\] .*chunk_len=5\].*k=2\b"),
    "k": (lambda index, folder: index.neighbors(np.zeros((3, L), int), 0), "k=0"),
    "run": (lambda index, folder: sharing(index.corpus, np.zeros((1, 4), int), 5, 10), r"run=5\b.*\b4\b"),
}


def build(folder, of: Corpus | None = None, **others) -> ChunkIndex:
    return ChunkIndex.build(folder, of or corpus(), L, NGRAMS, **others)


@pytest.mark.parametrize("what", OTHERS)
def test_a_stale_index_is_refused(what, tmp_path):
    call, match = OTHERS[what]
    build(tmp_path / "index", factory="Flat")
    with pytest.raises(ValueError, match=match):
        call(tmp_path / "index")


@pytest.mark.parametrize("what", REFUSED)
def test_refuses_bad_input(what, index, tmp_path):
    call, match = REFUSED[what]
    with pytest.raises(ValueError, match=match):
        call(index, tmp_path)


def test_a_damaged_or_exchanged_index_is_refused(tmp_path):
    folder = tmp_path / "index"
    ChunkIndex.build(folder, corpus(), L, NGRAMS)
    np.save(folder / "tokens.npy", VOCABULARY.encode(TEXT[::-1]))
    with pytest.raises(ValueError, match="stale"):
        ChunkIndex.load(folder)
    np.save(folder / "tokens.npy", VOCABULARY.encode(TEXT))
    file = next(folder.glob("*.faiss"))
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"index-\d+\.faiss\b"):
        ChunkIndex.load(folder)
    file.write_bytes(whole)
    about = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(json.dumps(about | {"added": 7, "chunks": 7}))
    with pytest.raises(ValueError, match=r"about\.json .*\b7\b"):
        ChunkIndex.load(folder)
    (folder / "about.json").write_text(json.dumps(about | {"format": 1}))
    with pytest.raises(ValueError, match=r"format 1\b"):
        ChunkIndex.load(folder)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        ChunkIndex.load(folder)


def test_the_command_prints_what_it_finds(tmp_path, capsys):
    ChunkIndex.build(tmp_path / "index", corpus(), L, NGRAMS)
    (tmp_path / "text.txt").write_text(TEXT[50:64])
    for flags in (["--prompt", TEXT[50:64]], ["--text", str(tmp_path / "text.txt")]):
        assert neighbors_command([str(tmp_path / "index"), *flags, "--k", "3"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2 * (1 + 3)
        assert repr(TEXT[50:55]) in lines[0]
        start, shown = lines[1].split(maxsplit=1)
        start = int(start)
        assert shown == f"{TEXT[start : start + L]!r} | {TEXT[start + L : start + 2 * L]!r}"
    assert neighbors_command([str(tmp_path / "index"), "--prompt", TEXT[50:64], "--k", "999999999"]) == 2
    assert re.search(r"\bk=999999999\b.* \d+ chunks", capsys.readouterr().err)
    assert neighbors_command([str(tmp_path / "index"), "--prompt", "men"]) == 2
    assert re.search(r"\b3 characters.*chunk_len=5\b", capsys.readouterr().err)
