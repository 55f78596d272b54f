"""Factory strings of FAISS: the ones that a chunk index may have, and the empty index that FAISS makes of them.

Whoever made a chunk index chose its factory string, and FAISS allocates tables for it before it reads a vector: their
size is computed first. https://github.com/facebookresearch/faiss/wiki/The-index-factory describes the strings.
"""

import re
from typing import Any

import numpy as np

from jaxmodels.process.texts import quoted
from jaxmodels.retro.retrieval.files import HEADER_BYTES, import_faiss, reason

EXACT_UP_TO = 200_000  # chunks; with 512 features they take 0.4 GB, and a query about 10 ms
LONGEST, MOST_COMPONENTS = 100, 8  # of a factory string; FAISS nests its calls for each component
# Components of a factory string. Others of FAISS take minutes to train, are not searched by inner products, or number
# the vectors in another way (IDMap).
COMPONENT = re.compile(
    r"L2norm|Flat|SQ(4|6|8|fp16|bf16)|PQ[0-9]+(x[0-9]+)?(fs|np)?|HNSW[0-9]+(_(Flat|SQ8|PQ[0-9]+))?"
    r"|IVF[0-9]+(_HNSW[0-9]+)?|(PCAR?|RR)[0-9]+|OPQ[0-9]+(_[0-9]+)?"
)
# Numbers in it: of cells; of links of each chunk; of bits of each part of a vector. Others are at most the width.
LARGEST = {"IVF": 2**20, "HNSW": 512, "x": 16}
CELL_BYTES = 160  # of an empty inverted list, measured


def default_factory(chunks: int, width: int) -> str:
    """FAISS factory string for a number of chunks: exact, or IVF-PQ with codes of 64 bytes and about 4·√n cells."""
    if chunks <= EXACT_UP_TO:
        return "Flat"
    cells = 2 ** round(np.log2(np.clip(4 * np.sqrt(chunks), 256, 65536)))
    parts = max(m for m in range(1, 65) if width % m == 0)
    return f"IVF{cells},PQ{parts}"


def make_searcher(factory: str, width: int) -> Any:
    """Empty FAISS index with inner products.

    Raises ValueError if FAISS refuses the factory string, or inner products with it; if it is longer than any of use;
    for a component that is not one of COMPONENT; or if its tables would take more than HEADER_BYTES.
    """
    faiss = import_faiss()
    components = factory.split(",")
    if len(factory) > LONGEST or len(components) > MOST_COMPONENTS:
        raise ValueError(
            f"factory={quoted(factory)} has {len(factory):,} characters and {len(components):,} components, must have "
            f"at most {LONGEST} and {MOST_COMPONENTS}"
        )
    size = table_bytes([numbers_of(component, factory, width) for component in components], width)
    if size > HEADER_BYTES:
        raise ValueError(
            f"factory={quoted(factory)} has tables of {size:,} bytes for width {width:,}, must be at most "
            f"{HEADER_BYTES:,}"
        )
    try:
        searcher = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    except (RuntimeError, MemoryError) as error:
        raise ValueError(f"factory={factory!r} is refused by FAISS for width {width}: {reason(error)}") from None
    if searcher.metric_type != faiss.METRIC_INNER_PRODUCT:  # HNSW with PQ
        raise ValueError(f"factory={factory!r} gives an index that FAISS does not search by inner products")
    return searcher


def numbers_of(component: str, factory: str, width: int) -> dict[str, int]:
    """Numbers of a component by what is before them, as {"PQ": 8, "x": 4}; raises ValueError as `make_searcher`."""
    if not COMPONENT.fullmatch(component):
        raise ValueError(
            f"factory={quoted(factory)} has {quoted(component)}, must be Flat, IVF, PQ, SQ, HNSW, PCA, PCAR, RR, OPQ "
            "or L2norm with their numbers"
        )
    numbers = re.findall(r"([A-Za-z]+|_)([0-9]+)", component)
    for kind, number in numbers:
        most = LARGEST.get(kind, max(width, 16))
        if len(number) > 7 or int(number) > most:
            raise ValueError(f"factory={quoted(factory)} has {quoted(kind + number)}, must be at most {most:,}")
    return {kind: int(number) for kind, number in numbers}


def table_bytes(components: list[dict[str, int]], width: int) -> int:
    """Bytes of the tables that FAISS allocates for components with these numbers, however few the vectors.

    Inverted lists; a matrix [d, d'] of each transform, whose d' is the width of what follows, and [d, d] of a PCA;
    centroids [2^bits, d] of product quantization, and in a graph the distances [M, 2^bits, 2^bits] between those of its
    M parts. The centers of cells are not counted: there are no more of them than vectors.
    """
    total = 0
    for numbers in components:
        total += CELL_BYTES * numbers.get("IVF", 0)
        if numbers.keys() & {"PCA", "PCAR", "RR", "OPQ"}:
            into = next((numbers[kind] for kind in ("PCA", "PCAR", "RR", "_") if numbers.get(kind)), width)
            total += 4 * width * (into + width * ("RR" not in numbers and "OPQ" not in numbers))
            width = into
        if "PQ" in numbers:
            total += 4 * width * 2 ** numbers.get("x", 8)
    return total
