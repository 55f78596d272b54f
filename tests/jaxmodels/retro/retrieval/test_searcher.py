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


def exchange(folder, content: bytes, factory: str = "Flat") -> None:
    """Give an index another FAISS file, and about.json its hash, as whoever makes one up would."""
    about = json.loads((folder / "about.json").read_text())
    (folder / about["index"]).write_bytes(content)
    about["sha256"], about["factory"] = hashlib.sha256(content).hexdigest(), factory
    (folder / "about.json").write_text(json.dumps(about))


def made(factory: str, ids=None, metric=faiss.METRIC_INNER_PRODUCT) -> bytes:
    """An index of N vectors."""
    searcher = faiss.index_factory(WIDTH, factory, metric)
    vectors = np.random.default_rng(0).normal(size=(N, WIDTH)).astype(np.float32)
    searcher.train(vectors)
    searcher.add(vectors) if ids is None else searcher.add_with_ids(vectors, np.asarray(ids, np.int64))
    return faiss.serialize_index(searcher).tobytes()


@pytest.mark.parametrize(
    ("factory", "content", "match"),
    [
        ("IVF3,Flat", lambda: made("IVF3,Flat", np.arange(N) + 1), "each chunk"),
        ("IVF3,Flat", lambda: made("IVF3,Flat", np.arange(N) % 7), "each chunk"),
        ("IVF3,Flat", lambda: made("IVF3,Flat", [-1, *range(1, N)]), "each chunk"),
        ("Flat", lambda: made("IDMap,Flat", [2**62, *range(1, N)]), "IndexIDMap"),
        ("PCA16,IVF3,Flat", lambda: made("PCA16,IVF3,Flat", np.arange(N) * 2), "each chunk"),
        ("Flat", lambda: made("Flat", metric=faiss.METRIC_L2), "metric"),
        ("Flat", lambda: made("HNSW4,Flat"), "IndexHNSWFlat, IndexFlat; by its factory string of IndexFlat"),
        ("IVF3,Flat", lambda: made("IVF3_HNSW4,Flat"), "IndexHNSW"),
        ("PCA16,Flat", lambda: made("Flat"), "PCAMatrix"),
        ("Flat", lambda: made("RR16,Flat"), "RandomRotationMatrix"),
        ("Flat", lambda: made("Flat,RFlat"), "IndexRefine"),
        ("Flat", lambda: b"", "cannot be read: .*truncated"),
        ("Flat", lambda: b"IxFI" + bytes(4), "cannot be read"),
        ("Flat", lambda: b"nope" + made("Flat")[4:], "cannot be read"),
        ("Flat", lambda: made("Flat")[:-1], "cannot be read: .*truncated"),
    ],
)
def test_a_file_of_another_content_is_refused(folder, factory, content, match):
    exchange(folder, content(), factory)
    with pytest.raises(ValueError, match=rf"{folder}/index-\d+\.faiss.*{match}"):
        ChunkIndex.load(folder)


def transform(searcher):
    """The transform before an index."""
    return faiss.downcast_VectorTransform(faiss.downcast_index(searcher).chain.at(0))


def with_bias(searcher):
    part = transform(searcher)
    part.have_bias = True
    faiss.copy_array_to_vector(np.empty(0, np.float32), part.b)


@pytest.mark.parametrize(
    ("factory", "change", "match"),
    [
        ("L2norm,Flat", lambda searcher: setattr(transform(searcher), "norm", 1.0), "norm=1"),
        ("PCA4,Flat", lambda s: faiss.copy_array_to_vector(np.ones(1, np.float32), transform(s).A), "A|cannot be read"),
        ("PCA4,Flat", with_bias, "numbers in b|cannot be read"),
        ("PCA4,Flat", lambda searcher: setattr(transform(searcher), "d_out", 400), "d_out=400|cannot be read"),
        ("IVF2,Flat", lambda s: faiss.downcast_index(faiss.downcast_index(s).quantizer).reset(), "0 centroids for 2"),
        ("IVF2,Flat", lambda searcher: setattr(faiss.downcast_index(searcher), "nlist", 1), "nlist=1|cannot be read"),
    ],
)
def test_parts_that_no_search_could_use_are_refused(folder, factory, change, match):
    searcher = faiss.deserialize_index(np.frombuffer(made(factory), np.uint8))
    change(searcher)
    exchange(folder, faiss.serialize_index(searcher).tobytes(), factory)
    with pytest.raises(ValueError, match=rf"{folder}/index-\d+\.faiss.*({match})"):
        ChunkIndex.load(folder)


def test_an_index_that_cannot_be_searched_is_refused_as_it_is_read(folder, monkeypatch):
    """Generation searches in a callback of JAX, which makes a traceback of each error."""

    def refused(*_):
        raise RuntimeError("Error in void search() at IndexIVF.cpp:1: Error: 'nprobe > 0' failed: no cells")

    monkeypatch.setattr(faiss.IndexFlat, "search", refused)
    with pytest.raises(ValueError, match=rf"{folder}/index-\d+\.faiss.*cannot be searched: no cells"):
        ChunkIndex.load(folder)


def test_inverted_lists_of_all_chunks_are_read(folder):
    exchange(folder, made("IVF3,Flat", np.random.default_rng(0).permutation(N)), "IVF3,Flat")
    assert len(ChunkIndex.load(folder)) == N


FACTORIES = ["Flat", "HNSW4,Flat", "IVF3,Flat", "IVF3_HNSW4,PQ2x4", "PCA8,SQ8", "SQfp16", "IVF2,SQbf16", "PCAR8,PQ4x4"]


@pytest.mark.parametrize("factory", FACTORIES)
def test_an_index_of_its_kind_is_read_and_finds_its_vectors(folder, factory):
    exchange(folder, made(factory), factory)
    assert ChunkIndex.load(folder).neighbors(CORPUS.passages(CORPUS.chunks(L)[:2], L)).min() >= 0


def test_settings_of_a_search_are_those_of_its_kind_and_not_of_the_file(folder):
    searcher = faiss.deserialize_index(np.frombuffer(made("HNSW4,Flat"), np.uint8))
    searcher.hnsw.efSearch = 2**31 - 1
    exchange(folder, faiss.serialize_index(searcher).tobytes(), "HNSW4,Flat")
    assert ChunkIndex.load(folder).searcher.hnsw.efSearch == faiss.IndexHNSWFlat(WIDTH, 4).hnsw.efSearch
    searcher = faiss.deserialize_index(np.frombuffer(made("PCA16,IVF3,Flat"), np.uint8))
    inner = faiss.downcast_index(searcher.index)
    inner.nprobe, inner.max_codes = 2**20, 1
    exchange(folder, faiss.serialize_index(searcher).tobytes(), "PCA16,IVF3,Flat")
    whole = ChunkIndex.load(folder).searcher  # owns its parts
    inner = faiss.downcast_index(whole.index)
    assert (inner.nprobe, inner.max_codes) == (1, 0)


def test_a_graph_that_no_search_enters_is_refused(folder):
    searcher = faiss.deserialize_index(np.frombuffer(made("HNSW4,Flat"), np.uint8))
    searcher.hnsw.entry_point = -1
    exchange(folder, faiss.serialize_index(searcher).tobytes(), "HNSW4,Flat")
    with pytest.raises(ValueError, match=rf"{folder}/index-\d+\.faiss.* none of its chunks"):
        ChunkIndex.load(folder)


@pytest.mark.parametrize("factory", ["Flat", "IVF3,Flat", "SQfp16", "IVF3,SQbf16", "HNSW4,Flat"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_refused(folder, factory, value):
    searcher = faiss.index_factory(WIDTH, factory, faiss.METRIC_INNER_PRODUCT)
    vectors = np.random.default_rng(0).normal(size=(N, WIDTH)).astype(np.float32)
    searcher.train(vectors)
    vectors[3, 5] = value
    searcher.add(vectors)
    exchange(folder, faiss.serialize_index(searcher).tobytes(), factory)
    with pytest.raises(ValueError, match=rf"{folder}/index-\d+\.faiss.*( NaN or infinite| not hold each chunk)"):
        ChunkIndex.load(folder)


def test_tables_that_are_not_finite_are_refused(folder):
    searcher = faiss.deserialize_index(np.frombuffer(made("PCA16,Flat"), np.uint8))
    table = faiss.downcast_VectorTransform(searcher.chain.at(0))
    faiss.copy_array_to_vector(np.full(WIDTH * WIDTH, np.nan, np.float32), table.A)
    exchange(folder, faiss.serialize_index(searcher).tobytes(), "PCA16,Flat")
    with pytest.raises(ValueError, match="PCAMatrix has numbers that are NaN"):
        ChunkIndex.load(folder)


def test_an_index_of_fewer_chunks_than_its_corpus_is_refused(folder):
    searcher = faiss.index_factory(WIDTH, "Flat", faiss.METRIC_INNER_PRODUCT)
    searcher.add(np.ones((1, WIDTH), np.float32))
    exchange(folder, faiss.serialize_index(searcher).tobytes())
    about = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(json.dumps(about | {"chunks": 1, "added": 1}))
    with pytest.raises(ValueError, match=f"{folder}.* 1 chunks, the corpus {N}"):
        ChunkIndex.load(folder)


@pytest.mark.parametrize("error", [MemoryError("std::bad_alloc"), RuntimeError("Error: 'x' failed: std::bad_alloc")])
def test_a_search_without_memory_names_the_index(folder, monkeypatch, error):
    def failing(*_):
        raise error

    chunks = ChunkIndex.load(folder)
    monkeypatch.setattr(type(chunks.searcher), "search", failing)
    with pytest.raises(ValueError, match=r"index-\d+\.faiss.*cannot be searched: std::bad_alloc"):
        chunks.neighbors(CORPUS.passages(CORPUS.chunks(L)[:2], L))


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
        exchange(folder, bytes(content), factory)
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
    (folder / "index-0000000003.faiss").write_bytes(b"IxFIold")
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
