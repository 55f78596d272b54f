"""`python -m tests.jaxmodels.io.full_disk FOLDER`: write each kind of file where files may have 9,000 bytes at most.

Prints a line for each: the name of the kind, and the error. Also has a context in which the disk is full.
"""

import contextlib
import json
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

LIMIT = 9_000
KEPT = (".jaxmodels.json", ".lock")  # files that a stopped index leaves on purpose
TEXT = "".join(f"{i} men and {i * i % 89} women went to sea. " for i in range(500))


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Context in which files can be made, but no byte written to them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def write_pt(folder: Path) -> None:
    from jaxmodels.io.formats.torch_files import write_state_dict

    write_state_dict(folder / "model.pt", {"a": np.zeros(10_000, np.float32)})


def write_safetensors(folder: Path) -> None:
    from jaxmodels.io.atomic import atomic_folder
    from jaxmodels.io.formats.safetensors import write_folder

    with atomic_folder(folder / "hf") as new:
        write_folder(new, {"a": np.zeros(10_000, np.float32)})


def write_model(folder: Path) -> None:
    import jaxmodels
    from tests.jaxmodels.mlp import mlp

    jaxmodels.save(mlp(5, 5, 2_000), folder / "model")


def write_tokens(folder: Path) -> None:
    from jaxmodels.training.tokenize import tokenize

    (folder / "sea.txt").write_text(TEXT[:990])
    tokenize(str(folder / "sea.txt"), folder / "tokens", "chars")


def write_text(folder: Path) -> None:
    from jaxmodels.io.atomic import atomic_file

    with atomic_file(folder / "report.json") as new:
        new.write_text(TEXT)


def build_index(folder: Path) -> None:
    from jaxmodels.retro.retrieval.corpus import Corpus
    from jaxmodels.retro.retrieval.embedders import HashedNGrams
    from jaxmodels.retro.retrieval.index import ChunkIndex
    from jaxmodels.text import CharVocabulary

    vocabulary = CharVocabulary.of(TEXT)
    corpus = Corpus.of(vocabulary.encode(TEXT[:1_000]), vocabulary)
    ChunkIndex.build(folder / "index", corpus, 5, HashedNGrams(64, 1, 2), progress=False)


KINDS: dict[str, Callable[[Path], None]] = {
    "pt": write_pt,
    "safetensors": write_safetensors,
    "model": write_model,
    "index": build_index,
    "tokens": write_tokens,
    "text": write_text,
}


def main(folder: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for name, write in KINDS.items():
        limit = 1_000 if name == "tokens" else LIMIT  # it has few
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            write(folder)
            found = "no error"
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        left = sorted(str(path.relative_to(folder)) for path in folder.rglob(".*") if path.name not in KEPT)
        print(json.dumps([name, found, left]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
