"""FAISS files whose hash fits about.json and whose content does not fit the index; links; what killed builds left."""

import hashlib
import json

import numpy as np
import pytest

from jaxmodels.retro.retrieval import examples, index
from jaxmodels.retro.retrieval.corpus import Corpus
from jaxmodels.retro.retrieval.embedders import HashedNGrams
from jaxmodels.retro.retrieval.examples import Lookup, attach, samples_of
from jaxmodels.retro.retrieval.index import ChunkIndex
from jaxmodels.text import CharVocabulary
from jaxmodels.training.data import Windows

faiss = pytest.importorskip("faiss")
L, WIDTH = 5, 16
TEXT = "".join(f"{i} men and {i * i % 89} women went to sea. " for i in range(23))
VOCABULARY = CharVocabulary.of(TEXT)
CORPUS = Corpus.of(VOCABULARY.encode(TEXT), VOCABULARY)
N = len(CORPUS.chunks(L))
NGRAMS = HashedNGrams(WIDTH, 1, 2)


@pytest.fixture
def folder(tmp_path):
    ChunkIndex.build(tmp_path / "index", CORPUS, L, NGRAMS)
    return tmp_path / "index"


def exchange(folder, content: bytes) -> None:
    """Give an index another FAISS file, and about.json its hash, as whoever makes one up would."""
    about = json.loads((folder / "about.json").read_text())
    (folder / about["index"]).write_bytes(content)
    about["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "about.json").write_text(json.dumps(about))


def made(factory: str, ids=None, metric=faiss.METRIC_INNER_PRODUCT) -> bytes:
    """An index of N vectors."""
    searcher = faiss.index_factory(WIDTH, factory, metric)
    vectors = np.random.default_rng(0).normal(size=(N, WIDTH)).astype(np.float32)
    searcher.train(vectors)
    searcher.add(vectors) if ids is None else searcher.add_with_ids(vectors, np.asarray(ids, np.int64))
    return faiss.serialize_index(searcher).tobytes()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (lambda: made("IVF3,Flat", np.arange(N) + 1), "each chunk"),
        (lambda: made("IVF3,Flat", np.arange(N) % 7), "each chunk"),
        (lambda: made("IVF3,Flat", [-1, *range(1, N)]), "each chunk"),
        (lambda: made("IDMap,Flat", [2**62, *range(1, N)]), "each chunk"),
        (lambda: made("PCA16,IVF3,Flat", np.arange(N) * 2), "each chunk"),
        (lambda: made("Flat", metric=faiss.METRIC_L2), "metric"),
        (lambda: b"", "cannot be read"),
        (lambda: b"IxFI" + bytes(4), "cannot be read"),
        (lambda: b"nope" + made("Flat")[4:], "cannot be read"),
        (lambda: made("Flat")[:-1], "cannot be read"),
    ],
)
def test_a_file_of_another_content_is_refused(folder, content, match):
    exchange(folder, content())
    with pytest.raises(ValueError, match=rf"{folder}/index-\d+\.faiss.*{match}"):
        ChunkIndex.load(folder)


def test_inverted_lists_of_all_chunks_are_read(folder):
    exchange(folder, made("IVF3,Flat", np.random.default_rng(0).permutation(N)))
    assert len(ChunkIndex.load(folder)) == N


NUMBERS = (0, 1, 7, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)


@pytest.mark.parametrize("factory", ["Flat", "IVF3,Flat"])
def test_absurd_sizes_are_refused_or_change_nothing(folder, factory):
    """Every number of the header becomes another; FAISS may then allocate a bounded amount of memory."""
    whole, rng = made(factory), np.random.default_rng(0)
    chunk = CORPUS.passages(CORPUS.chunks(L)[:2], L)
    refused = 0
    for place in range(4, 100, 4):
        content = bytearray(whole)
        content[place : place + 8] = int(rng.choice(np.array(NUMBERS, np.uint64))).to_bytes(8, "little")
        exchange(folder, bytes(content))
        try:
            found = ChunkIndex.load(folder).neighbors(chunk, 2)
        except ValueError:
            refused += 1
        else:
            assert found.shape == (2, 2)
    assert refused > 5


@pytest.mark.parametrize("name", ["about.json", "tokens.npy", "documents.npy", "vocabulary.json", "training.npz"])
def test_a_link_in_the_folder_is_refused(folder, name, tmp_path):
    (tmp_path / "mine").write_text("mine")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "mine")
    for opened in (ChunkIndex.load, lambda f: ChunkIndex.build(f, CORPUS, L, NGRAMS)):
        with pytest.raises(ValueError, match=f"{folder / name} is a symbolic link"):
            opened(folder)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_build_goes_on_where_a_killed_one_left_temporary_and_superseded_files(folder, tmp_path):
    new = tmp_path / "new"
    new.mkdir()
    (new / ".about.json.0123abcd.jaxmodels").write_text('{"form')
    assert len(ChunkIndex.build(new, CORPUS, L, NGRAMS)) == N
    (folder / "index-0000000003.faiss").write_text("old")
    ChunkIndex.build(folder, CORPUS, L, NGRAMS)
    assert [path.name for path in folder.glob("*.faiss")] == [f"index-{N:010}.faiss"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        ChunkIndex.build(tmp_path / "photos", CORPUS, L, NGRAMS)


@pytest.mark.parametrize("wrong", [10**6, -2, 1])  # 1 is in the corpus, and no chunk begins there
def test_saved_neighbors_that_are_no_chunks_are_looked_up_again(folder, tmp_path, wrong):
    chunks, file = ChunkIndex.load(folder), tmp_path / "training.npz"
    samples = samples_of(Windows(CORPUS.tokens[:100], 11, "test"))
    expected = attach(samples, chunks, Lookup(2), file).neighbors
    with np.load(file) as kept:
        content = dict(kept)
    content["neighbors"][0, 0, 0] = wrong
    np.savez(file, **content)
    np.testing.assert_array_equal(attach(samples, chunks, Lookup(2), file).neighbors, expected)
    assert examples.read(file, str(content["fingerprint"]), expected.shape)[0, 0, 0] != wrong


def test_a_search_that_faiss_refuses_is_one_line(folder, monkeypatch):
    chunks = ChunkIndex.load(folder)

    def refused(*arguments):
        raise RuntimeError("Error in void search() at IndexIVF.cpp:1: Error: 'nprobe > 0' failed: no cells")

    monkeypatch.setattr(chunks.searcher, "search", refused)
    with pytest.raises(ValueError, match="cannot be searched: no cells"):
        chunks.neighbors(CORPUS.passages(CORPUS.chunks(L)[:2], L))
    assert index.make_searcher("Flat", WIDTH).ntotal == 0


def test_inverted_lists_in_another_file_are_refused_and_the_file_is_not_opened(folder, tmp_path):
    elsewhere = tmp_path / "mine.ivfdata"
    searcher = faiss.deserialize_index(np.frombuffer(made("IVF2,Flat"), np.uint8))
    lists = faiss.OnDiskInvertedLists(searcher.nlist, searcher.code_size, str(elsewhere))
    lists.merge_from_1(searcher.invlists)
    searcher.replace_invlists(lists)
    exchange(folder, faiss.serialize_index(searcher).tobytes())
    for content in (elsewhere.read_bytes(), b"mine", None):  # FAISS would read the first, and look for the last
        elsewhere.unlink() if content is None else elsewhere.write_bytes(content)
        with pytest.raises(ValueError, match=r"index-\d+\.faiss cannot be read: .* in another file"):
            ChunkIndex.load(folder)
        assert (elsewhere.read_bytes() if elsewhere.exists() else None) == content
