"""`python -m bench.tokenize`: `jaxmodels tokenize`, compared with the tokenizers library on the same text.

Each contender runs in a process of its own, in turns. tokenizers: the text is cut at ends of lines into texts of 16,000
characters, which go to `encode_batch` (or `encode_batch_fast`, which computes no offsets) a million characters at a
time; the ids are made a NumPy array and kept. With --whole also one `encode` of the whole text. jaxmodels writes and
hashes a folder of tokens. Without --text, Python's language reference is repeated to --megabytes; without --tokenizer,
a byte-level BPE of 16,000 tokens is trained on it.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PIECE, BATCH = 16_000, 1_000_000  # characters


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(prog="python -m bench.tokenize", description=__doc__)
    add = arguments.add_argument
    add("--text", type=Path, metavar="FILE", help="UTF-8 text")
    add("--megabytes", type=int, default=32, metavar="N", help="size of the text without --text (default 32)")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json")
    add("--rounds", type=int, default=3, metavar="N", help="processes of each contender (default 3)")
    add("--whole", action="store_true", help="also encode the whole text at once: 160 bytes of memory a byte")
    add("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    return arguments.parse_args()


def main() -> None:
    options = parse()
    if options.worker:
        work(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        text = options.text or repeated(Path(folder) / "text.txt", options.megabytes)
        tokenizer = options.tokenizer or trained(Path(folder) / "tokenizer.json")
        megabytes = text.stat().st_size / 1e6
        print(f"{megabytes:.0f} MB, {os.cpu_count()} CPUs", flush=True)
        names = [name for name in WORKERS if options.whole or name != "encode"]
        found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(options.rounds):
            for name in names:
                arguments = ["--worker", name, "--text", str(text), "--tokenizer", str(tokenizer)]
                done = subprocess.run(
                    [sys.executable, "-m", "bench.tokenize", *arguments], check=True, stdout=subprocess.PIPE
                )
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    for name, runs in found.items():
        seconds, cpu, peak = (statistics.median(run[key] for run in runs) for key in ("seconds", "cpu", "peak"))
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(runs, found["jaxmodels"], strict=True)]
        print(
            f"{name:18s} {megabytes / seconds:6.2f} MB/s  {cpu:7.1f} s of processor time  peak {peak:8,.0f} MB  "
            f"{statistics.median(ratios):5.2f}× jaxmodels' time  {runs[0]['tokens']:,.0f} tokens"
        )


def repeated(file: Path, megabytes: int) -> Path:
    from jaxmodels.text import load_corpus

    page = load_corpus("python_docs").encode()
    with file.open("wb") as opened:
        for _ in range(megabytes * 10**6 // len(page) + 1):
            opened.write(page)
    return file


def trained(file: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from jaxmodels.text import load_corpus

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=16_000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([load_corpus("python_docs")], trainer)
    tokenizer.save(str(file))
    return file


def work(options: argparse.Namespace) -> None:
    """Run one contender and print its seconds, processor time, peak memory and number of tokens as JSON."""
    began = time.perf_counter()
    tokens = WORKERS[options.worker](options.text, options.tokenizer)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps({"seconds": seconds, "cpu": time.process_time(), "peak": peak, "tokens": tokens}))


def ours(text: Path, tokenizer: Path) -> int:
    from jaxmodels.text import TokenizerFile
    from jaxmodels.text.sources import open_sources
    from jaxmodels.text.tokens import write_sources

    with tempfile.TemporaryDirectory() as folder:
        tokens = write_sources(Path(folder) / "tokens", open_sources(str(text)), TokenizerFile.read(tokenizer))
        return len(tokens.train) + len(tokens.validation)


def pieces(text: Path) -> Iterator[str]:
    """Texts of about PIECE characters that end with a line."""
    with text.open(encoding="utf-8", newline="") as opened:
        while lines := opened.readlines(PIECE):
            yield "".join(lines)


def batched(text: Path, tokenizer: Path, method: str) -> int:
    import numpy as np
    from tokenizers import Tokenizer

    encode = getattr(Tokenizer.from_file(str(tokenizer)), method)
    ids, batch, size = [], [], 0
    for piece in pieces(text):
        batch.append(piece)
        size += len(piece)
        if size > BATCH:
            ids += [np.asarray(found.ids, np.uint16) for found in encode(batch, add_special_tokens=False)]
            batch, size = [], 0
    ids += [np.asarray(found.ids, np.uint16) for found in encode(batch, add_special_tokens=False)]
    return len(np.concatenate(ids))


def whole(text: Path, tokenizer: Path) -> int:
    from tokenizers import Tokenizer

    content = text.read_bytes().decode()
    return len(Tokenizer.from_file(str(tokenizer)).encode(content, add_special_tokens=False).ids)


WORKERS = {
    "jaxmodels": ours,
    "encode_batch": lambda text, tokenizer: batched(text, tokenizer, "encode_batch"),
    "encode_batch_fast": lambda text, tokenizer: batched(text, tokenizer, "encode_batch_fast"),
    "encode": whole,
}

if __name__ == "__main__":
    main()
