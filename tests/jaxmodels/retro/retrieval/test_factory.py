"""Factory strings of FAISS: those that are refused before FAISS sees them, and indexes of all the others."""

import hashlib
import json

import numpy as np
import pytest

from jaxmodels.retro.retrieval import files, parts
from jaxmodels.retro.retrieval.corpus import Corpus
from jaxmodels.retro.retrieval.embedders import HashedNGrams
from jaxmodels.retro.retrieval.factory import default_factory, make_searcher
from jaxmodels.retro.retrieval.index import ChunkIndex
from jaxmodels.text import CharVocabulary

faiss = pytest.importorskip("faiss")
L, WIDTH = 5, 16
TEXT = "".join(f"{i} men and {i * i % 89} women went to sea. " for i in range(23))
VOCABULARY = CharVocabulary.of(TEXT)
CORPUS = Corpus.of(VOCABULARY.encode(TEXT), VOCABULARY)
NGRAMS = HashedNGrams(WIDTH, 1, 2)


def test_exact_for_small_corpora_and_ivf_pq_beyond():
    assert default_factory(200_000, 512) == "Flat"
    assert default_factory(1_000_000, 512) == "IVF4096,PQ64"
    assert default_factory(1_000_000, 100) == "IVF4096,PQ50"


@pytest.mark.parametrize(
    "factory",
    ["RR16," * 5000 + "Flat", "L2norm," * 8 + "Flat", "IVF1" + "0" * 97 + ",Flat", "IVF4_HNSW8," * 9 + "Flat"],
)
def test_a_long_factory_string_is_refused(factory, tmp_path):
    components = factory.count(",") + 1
    with pytest.raises(ValueError, match=rf"^factory=.* {len(factory):,} characters and {components:,} components"):
        make_searcher(factory, WIDTH)
    folder = tmp_path / "index"
    ChunkIndex.build(folder, CORPUS, L, NGRAMS)
    about = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(json.dumps(about | {"factory": factory}))
    with pytest.raises(ValueError, match=f"{folder}.*factory="):
        ChunkIndex.load(folder)


@pytest.mark.parametrize(
    ("factory", "width", "size"),
    [
        ("PQ1x16", 16384, 2**32),
        ("PQ1x16np", 16384, 2**32),
        ("IVF4,PQ1x16", 16384, 2**32 + 640),
        ("IVF1048576,PQ8x14", 4096, 2**28 + 2**20 * 160),
        ("OPQ16,Flat", 16384, 2**30),
        ("PCA64,Flat", 16384, 2**30 + 2**22),
        ("RR16384,RR8192,Flat", 16384, 2**30 + 2**29),
    ],
)
def test_tables_that_would_fill_the_memory_are_refused(factory, width, size):
    with pytest.raises(ValueError, match=f"factory='{factory}' .* {size:,} bytes for width {width:,}"):
        make_searcher(factory, width)


@pytest.mark.parametrize(
    ("factory", "width"),
    [
        *[(default_factory(n, width), width) for n in (10**6, 10**8, 10**10) for width in (100, 512, 1024, 4096)],
        ("Flat", 16384),
        ("SQ8", 16384),
        ("HNSW32", 16384),
        ("IVF65536_HNSW32,Flat", 16384),
        ("PQ64x12", 4096),
        ("PCA256,PQ64x16", 1024),
        ("OPQ64_256,IVF65536_HNSW32,PQ64x4fs", 4096),
    ],
)
def test_a_factory_of_common_sizes_is_admitted(factory, width):
    assert make_searcher(factory, width).d == width


@pytest.mark.parametrize("factory", ["HNSW4,PQ4x4", "HNSW4_PQ4", "PCA8,HNSW4_PQ4"])
def test_a_factory_of_another_metric_is_refused(factory):
    with pytest.raises(ValueError, match=f"factory='{factory}' .* inner products"):
        make_searcher(factory, WIDTH)


@pytest.mark.parametrize("factory", ["IDMap,Flat", "IDMap,HNSW8", "PCA8,IDMap,Flat"])
def test_a_factory_whose_index_cannot_add_chunks_is_refused(factory, tmp_path):
    with pytest.raises(ValueError, match=f"factory='{factory}' has 'IDMap'"):
        ChunkIndex.build(tmp_path / "index", CORPUS, L, NGRAMS, factory=factory)
    assert not (tmp_path / "index").exists()


def test_a_build_that_fails_names_the_factory_and_leaves_room_for_another(tmp_path, monkeypatch):
    def failing(*_):
        raise RuntimeError("Error in add() at Index.cpp:1: Error: 'n > 0' failed: no room")

    with monkeypatch.context() as patched:
        patched.setattr(faiss.IndexFlat, "add", failing)
        with pytest.raises(ValueError, match=r"^factory='Flat' .* no room"):
            ChunkIndex.build(tmp_path / "index", CORPUS, L, NGRAMS, factory="Flat")
    with pytest.raises(ValueError, match="factory='PQ8x12' cannot be trained"):
        ChunkIndex.build(tmp_path / "index", CORPUS, L, NGRAMS, factory="PQ8x12")
    ChunkIndex.build(tmp_path / "index", CORPUS, L, NGRAMS, factory="SQ8")
    assert ChunkIndex.load(tmp_path / "index").about["factory"] == "SQ8"
    with pytest.raises(ValueError, match=r"factory=SQ8.*factory=Flat"):
        ChunkIndex.build(tmp_path / "index", CORPUS, L, NGRAMS, factory="Flat")


@pytest.mark.parametrize(("factory", "least"), [("OPQ4,PQ4x4", 16), ("OPQ4_8,Flat", 8), ("PCA12,OPQ4,IVF3,PQ4x4", 12)])
def test_fewer_chunks_than_features_are_not_rotated(factory, least, tmp_path):
    """FAISS would crash with enough chunks for its product quantization."""
    few = Corpus.of(VOCABULARY.encode(TEXT[: L * (least - 1)]), VOCABULARY)
    with pytest.raises(ValueError, match=rf"^factory='{factory}' rotates to {least} features, .* {least - 1} chunks"):
        ChunkIndex.build(tmp_path / "index", few, L, NGRAMS, factory=factory)


CODES = ["Flat", "SQ4", "SQ6", "SQ8", "SQfp16", "SQbf16", "PQ4x4", "PQ4x4np", "PQ4x5", "PQ4x4fs"]
TRANSFORMS = ["L2norm", "PCA8", "PCAR8", "RR8", "OPQ4", "OPQ4_8", "RR8,L2norm", "PCA8,OPQ4"]
ADMITTED = [
    *CODES,
    *[f"{cells},{code}" for cells in ("IVF3", "IVF3_HNSW4") for code in CODES if code != "SQ6"],
    *["HNSW4", "HNSW4_Flat", "HNSW4,Flat", "HNSW4_SQ8", "HNSW4,SQ4"],
    *[f"{transform},{code}" for transform in TRANSFORMS for code in ("Flat", "PQ4x4", "IVF3,PQ4x4fs", "HNSW4,SQ8")],
]


def made_quicker(factory: str, width: int = WIDTH):
    """Searcher whose training takes no minute: OPQ with few codes and iterations, PQ whose codes are in any order."""
    searcher = make_searcher(factory, width)
    left = [searcher]
    for part in map(faiss.downcast_index, left):
        if isinstance(part, faiss.IndexPreTransform):
            left.append(part.index)
            for matrix in (faiss.downcast_VectorTransform(part.chain.at(i)) for i in range(part.chain.size())):
                if isinstance(matrix, faiss.OPQMatrix):
                    matrix.niter = matrix.niter_pq = matrix.niter_pq_0 = 1
                    matrix.pq = faiss.ProductQuantizer(matrix.d_out, 4, 4)
                    matrix.pq.this.disown()
        if hasattr(part, "do_polysemous_training"):
            part.do_polysemous_training = False
    return searcher


@pytest.mark.parametrize("factory", ADMITTED)
def test_an_index_of_each_factory_that_is_admitted_can_be_opened(factory, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxmodels.retro.retrieval.index.make_searcher", made_quicker)
    built = ChunkIndex.build(tmp_path / "index", CORPUS, L, NGRAMS, factory=factory)
    monkeypatch.undo()
    chunks = CORPUS.passages(CORPUS.chunks(L)[:9], L)
    np.testing.assert_array_equal(ChunkIndex.load(tmp_path / "index").neighbors(chunks), built.neighbors(chunks))


def test_distances_between_codes_are_not_computed_as_a_file_is_read(tmp_path, monkeypatch):
    """There are 4^bits, which take 17 GB for a file of 4 MB."""
    folder, sizes = tmp_path / "index", []
    ChunkIndex.build(folder, CORPUS, L, NGRAMS)
    about = json.loads((folder / "about.json").read_text())
    searcher = faiss.IndexHNSWPQ(WIDTH, 1, 8, 8, faiss.METRIC_INNER_PRODUCT)
    storage = faiss.downcast_index(searcher.storage)
    storage.codes.resize(about["added"])
    searcher.hnsw.prepare_level_tab(about["added"], False)
    searcher.is_trained, searcher.ntotal, storage.ntotal = True, about["added"], about["added"]
    content = faiss.serialize_index(searcher).tobytes()
    (folder / about["index"]).write_bytes(content)
    (folder / "about.json").write_text(json.dumps(about | {"sha256": hashlib.sha256(content).hexdigest()}))

    def fit_to(searcher, empty):
        sizes.append(faiss.downcast_index(searcher.storage).pq.sdc_table.size())
        parts.fit_to(searcher, empty)

    monkeypatch.setattr(files, "fit_to", fit_to)
    with pytest.raises(ValueError, match=r"index-\d+\.faiss.* IndexHNSWPQ, IndexPQ; by its factory string"):
        ChunkIndex.load(folder)
    assert sizes == [0]
