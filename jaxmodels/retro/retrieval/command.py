"""Command `jaxmodels neighbors`: print the nearest passages of an index for each chunk of a text."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from jaxmodels.process import programs
from jaxmodels.process.arguments import Parser
from jaxmodels.process.extras import require
from jaxmodels.retro.retrieval.embedders import embedder_of
from jaxmodels.retro.retrieval.index import ChunkIndex
from jaxmodels.text import load_corpus

PROGRAM = "python -m jaxmodels.retro.neighbors"
EXAMPLES = """\
examples:
  jaxmodels neighbors runs/retro/index --prompt "ROMEO: O, she doth teach the torches"
  jaxmodels neighbors runs/retro/index --text FILE --k 4

INDEX is built by `python -m train.retro`. A bar separates each chunk from its continuation.
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """Arguments of the command."""
    arguments = Parser(
        prog=prog,
        description="Print the nearest chunks of a corpus, with their continuations, for each chunk of a text.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument("index", type=Path, metavar="INDEX", help="folder of a chunk index")
    given = arguments.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", help="text to look up")
    given.add_argument("--text", metavar="FILE", help="UTF-8 file to look up, or python_docs, tiny_shakespeare")
    arguments.add_argument("--k", type=int, default=2, help="number of neighbors of a chunk (default: 2)")
    arguments.add_argument(
        "--embedder",
        metavar="NAME",
        help="embedder that INDEX was built with, such as bert:MODEL; required if it loads a model (default: hashed "
        "n-grams)",
    )
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Print neighbors and return the exit code; `prog` is the command as typed."""
    options = parser(prog).parse_args(argv)

    def shown() -> None:
        require("retro", "faiss", "sklearn")
        embedder = None if options.embedder is None else embedder_of(options.embedder)
        index = ChunkIndex.load(options.index, embedder=embedder)
        index.check_k(options.k, "k", options.index)
        text = options.prompt if options.text is None else load_corpus(options.text)
        show(index, text, options.k)

    return programs.run(shown, prog)


def show(index: ChunkIndex, text: str, k: int) -> None:
    """Print the neighbors of a text's complete chunks; raises ValueError if it has none, or unknown characters."""
    corpus, length = index.corpus, index.chunk_len
    ids = corpus.vocabulary.encode(text)
    if len(ids) < length:
        raise ValueError(f"text has {len(ids)} {corpus.vocabulary.unit}s; a chunk needs chunk_len={length}")
    chunks = ids[: len(ids) // length * length].reshape(-1, length)
    for number, (chunk, starts) in enumerate(zip(chunks, index.neighbors(chunks, k), strict=True)):
        print(f"{number * length:8}  {corpus.vocabulary.decode(chunk)!r}")
        for start in map(int, starts):
            if start < 0:
                print("          none")
                continue
            found = corpus.text(start, 2 * length)
            head = corpus.text(start, length)
            print(f"    {start:>10}  {head!r} | {found[len(head) :]!r}")
