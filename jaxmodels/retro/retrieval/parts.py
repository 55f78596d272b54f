"""Parts of a FAISS index that was read: of the kinds in its factory string, with its settings, of finite numbers.

FAISS's file holds the settings of a search too, such as the number of candidates that a graph keeps: one of billions
would fill the memory. They are set as in an empty index that FAISS makes of the factory string.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

# Settings of a search, of an index or of its graph.
SETTINGS = ("nprobe", "max_codes", "parallel_mode", "polysemous_ht", "scan_table_threshold", "search_type", "k_factor")
OF_GRAPHS = ("efSearch", "check_relative_distance", "search_bounded_queue")


def fit_to(searcher: Any, empty: Any) -> None:
    """Give an index the settings of an empty one; raises ValueError if it has other kinds of parts, or smaller ones."""
    ours, theirs = list(parts(searcher)), list(parts(empty))
    kinds, expected = ([kind_of(part) for part in one] for one in (ours, theirs))
    if kinds != expected:
        raise ValueError(f"it consists of {', '.join(kinds[:9])}; by its factory string of {', '.join(expected)}")
    for part, model in zip(ours, theirs, strict=True):
        copy(SETTINGS, model, part)
        check_sizes(part, model)
        if hasattr(model, "hnsw"):
            copy(OF_GRAPHS, model.hnsw, part.hnsw)


def check_sizes(part: Any, model: Any) -> None:
    """Raise ValueError if a part maps other widths than that of an empty index, or has fewer numbers than it uses."""
    import faiss

    name = type(part).__name__
    for field in ("d", "d_in", "d_out", "norm", "nlist"):
        if (found := getattr(part, field, None)) != (wanted := getattr(model, field, None)):
            raise ValueError(f"its {name} has {field}={found}; by its factory string {wanted}")
    if isinstance(part, faiss.LinearTransform):
        sizes = {"A": part.d_in * part.d_out, "b": part.d_out * part.have_bias}
        for field, least in sizes.items():
            if (size := getattr(part, field).size()) < least:
                raise ValueError(f"its {name} has {size} numbers in {field}, needs {least}")
    if isinstance(part, faiss.IndexIVF) and part.quantizer.ntotal != part.nlist:
        raise ValueError(f"its {name} has {part.quantizer.ntotal} centroids for {part.nlist} cells")


def kind_of(part: Any) -> str:
    """Name of a part's class; FAISS reads an IndexFlatIP as an IndexFlat, and an OPQMatrix as a LinearTransform."""
    import faiss

    read_as = ((faiss.IndexFlat, "IndexFlat"), (faiss.OPQMatrix, "LinearTransform"))
    return next((name for kind, name in read_as if isinstance(part, kind)), type(part).__name__)


def copy(names: tuple[str, ...], source: Any, target: Any) -> None:
    for name in names:
        if hasattr(source, name) and hasattr(target, name):
            setattr(target, name, getattr(source, name))


def parts(searcher: Any) -> Iterator[Any]:
    """An index and the indexes and transforms that it consists of, of their own classes, outermost first."""
    import faiss

    left = [searcher]
    while left:
        part = left.pop()
        if isinstance(part, faiss.VectorTransform):
            yield faiss.downcast_VectorTransform(part)
            continue
        part = faiss.downcast_index(part)
        yield part
        if isinstance(part, faiss.IndexPreTransform):
            chain: Any = part.chain
            left += [part.index, *(chain.at(i) for i in range(chain.size()))]
        else:
            names = ("index", "base_index", "refine_index", "storage", "quantizer")
            left += [getattr(part, name) for name in names if getattr(part, name, None) is not None]


def rotated(searcher: Any) -> int:
    """Features of the widest OPQ of an index, 0 if it has none: trained on fewer vectors, FAISS crashes."""
    import faiss

    return max((part.d_out for part in parts(searcher) if isinstance(part, faiss.OPQMatrix)), default=0)


def check_finite(searcher: Any) -> None:
    """Raise ValueError if a vector or table of an index has a number that is not finite: no search would find it."""
    for part in parts(searcher):
        for array in numbers(part):
            if not np.isfinite(array).all():
                raise ValueError(f"its {type(part).__name__} has numbers that are NaN or infinite")


def numbers(part: Any) -> Iterator[np.ndarray]:
    """Floating-point numbers of a part, in pieces."""
    import faiss

    if isinstance(part, faiss.IndexFlat):
        yield faiss.rev_swig_ptr(part.get_xb(), part.ntotal * part.d) if part.ntotal else np.empty(0)
    for name in ("A", "b", "mean"):  # of linear transforms
        if isinstance(part, faiss.LinearTransform) and hasattr(part, name):
            yield faiss.vector_to_array(getattr(part, name))
    if hasattr(part, "pq"):
        yield faiss.vector_to_array(part.pq.centroids)
    if hasattr(part, "sq"):
        yield faiss.vector_to_array(part.sq.trained)
    if isinstance(part, faiss.IndexScalarQuantizer):
        yield halves(faiss.vector_to_array(part.codes), part.sq.qtype)
    if isinstance(part, faiss.IndexIVFFlat | faiss.IndexIVFScalarQuantizer):
        lists: Any = part.invlists
        for i in range(lists.nlist):
            if size := lists.list_size(i):
                codes = faiss.rev_swig_ptr(lists.get_codes(i), size * part.code_size)
                yield halves(codes, part.sq.qtype) if hasattr(part, "sq") else codes.view(np.float32)


def halves(codes: np.ndarray, kind: int) -> np.ndarray:
    """Numbers of 16 bits as FAISS stores them; none of other kinds, whose codes are integers."""
    import faiss

    if kind == faiss.ScalarQuantizer.QT_fp16:
        return codes.view(np.float16)
    if kind == faiss.ScalarQuantizer.QT_bf16:
        return (codes.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.empty(0, np.float32)
