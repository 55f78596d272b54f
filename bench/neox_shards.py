"""`python -m bench.neox_shards`: memory and speed of the conversion of GPT-NeoX shards and of Hugging Face folders.

Creates a synthetic checkpoint of the given size in the layout of the released ones (Pythia-2.8B's width, as many blocks
as needed), and converts it to each format in a separate process. Prints for each: the peak of anonymous memory above
that of the process at start (excluding pages of mapped files), in multiples of the largest layer (limit: 3); and bytes
per second relative to a plain sequential write of the same size with fsync, made just before and just after, as the
median of the rounds' ratios.

A second table says what bounds the speed, from the same processes: processor time, in user mode (reading, transposing,
checksums of .pt files) and in the kernel (copies into the page cache), and the rate that all processors would reach if
that were all; and the rates of conversion and plain write without fsync and without early writing to disk.

    python -m bench.neox_shards --gigabytes 6 --folder /some/disk
    python -m bench.neox_shards --gigabytes 6 --folder /some/disk --make-only      # create only the checkpoint
    python -m bench.neox_shards --form bin --gigabytes 0.325 --hidden 768 --heads 12 --vocabulary 50304  # Pythia-160M
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench import published
from bench.published import FORMS

HIDDEN, HEADS, VOCABULARY = 2560, 32, 50_432
TARGETS = ("flax", "hf", "neox")


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(
        prog="python -m bench.neox_shards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument("--gigabytes", type=float, default=6, help="size of the checkpoint (default 6)")
    arguments.add_argument("--hidden", type=int, default=HIDDEN, help=f"hidden size (default {HIDDEN})")
    arguments.add_argument("--heads", type=int, default=HEADS, help=f"attention heads (default {HEADS})")
    arguments.add_argument(
        "--vocabulary", type=int, default=VOCABULARY, help=f"rows of the embedding (default {VOCABULARY})"
    )
    arguments.add_argument("--model-parallel", type=int, default=2, help="ranks of the checkpoint (default 2)")
    arguments.add_argument(
        "--ranks-written", type=int, default=4, help="model-parallel ranks of the format neox (default 4)"
    )
    arguments.add_argument(
        "--form",
        choices=("shards", *FORMS),
        default="shards",
        help="form of the checkpoint: GPT-NeoX's shards (default), pytorch_model.bin, the same in the format before "
        "torch 1.6, its shards with an index, or safetensors",
    )
    arguments.add_argument("--rounds", type=int, default=3, help="conversions to each format (default 3)")
    arguments.add_argument("--to", choices=TARGETS, action="append", help="convert only to this format; repeatable")
    arguments.add_argument("--folder", type=Path, help="folder for all files (default: the system's temporary folder)")
    arguments.add_argument("--make-only", action="store_true", help="create FOLDER/checkpoint, keep it, and stop")
    arguments.add_argument("--child", nargs=3, metavar=("SRC", "DST", "TO"), help=argparse.SUPPRESS)
    return arguments.parse_args()


def main() -> None:
    options = parse()
    if options.child:
        source, target, to = options.child
        convert(source, target, to, options.ranks_written)
        return
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    if options.make_only:
        make(Path(options.folder or ".") / "checkpoint", options)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(Path(folder), options)


def measure(folder: Path, options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from bench.timing import stamp
    from jaxmodels.convert.open import open_source
    from jaxmodels.convert.operations import largest_layer

    make(folder / "checkpoint", options)
    source = open_source(folder / "checkpoint").neox()
    layer, total = largest_layer(source), source.nbytes()
    print(stamp(os.cpu_count() or 1))
    form = f"shards of mp {options.model_parallel}" if options.form == "shards" else options.form
    title = (
        f"{form}, {total / 1e9:.2f} GB, hidden {options.hidden}, {source.config.n_layers} blocks; "
        f"largest layer {layer / 1e6:.0f} MB"
    )
    table = Table(title=title, title_justify="left")
    bounds = Table(title="What bounds it: processor time, and rates without the disk", title_justify="left")
    for heading in ("to", "peak MB", "÷ largest layer", "GB/s", "plain write GB/s", "ratio"):
        table.add_column(heading, justify="right" if heading != "to" else "left")
    headings = ("to", "user s/GB", "kernel s/GB", "plain write s/GB", "processors GB/s", "no disk GB/s", "plain GB/s")
    for heading in headings:
        bounds.add_column(heading, justify="right" if heading != "to" else "left")
    for to in options.to or TARGETS:
        rounds = [
            watched(folder / "checkpoint", folder / "target", to, options.ranks_written) for _ in range(options.rounds)
        ]
        peak = max(round.peak for round in rounds)
        seconds = statistics.median(round.seconds for round in rounds)
        plain = statistics.median(round.plain for round in rounds)
        ratio = statistics.median(round.plain / round.seconds for round in rounds)
        name = f"{to}, mp {options.ranks_written}" if to == "neox" else to
        cells = (peak / 1e6, peak / layer, total / seconds / 1e9, total / plain / 1e9, ratio)
        table.add_row(name, *(f"{cell:.2f}" if i else f"{cell:.0f}" for i, cell in enumerate(cells)))
        user, kernel, plain_used, cached, plain_cached = (
            statistics.median(getattr(round, field) for round in rounds) / total * 1e9
            for field in ("user", "system", "plain_used", "cached", "plain_cached")
        )
        limit = (os.cpu_count() or 1) / (user + kernel) if user + kernel else math.inf
        shown = (user, kernel, plain_used, limit, 1 / cached, 1 / plain_cached)
        bounds.add_row(name, *(f"{cell:.2f}" for cell in shown))
    console = Console(width=120)
    console.print(table)
    console.print(bounds)


def make(folder: Path, options: argparse.Namespace) -> None:
    """Write a checkpoint in the released layout, float16, with random values."""
    import torch
    from rich.console import Console
    from rich.progress import track

    ranks, hidden, rows = options.model_parallel, options.hidden, options.vocabulary
    block = 12 * hidden**2 * 2
    blocks = max(1, round((options.gigabytes * 1e9 - 2 * rows * hidden * 2) / block))
    step = folder / "global_step0"
    rng = np.random.default_rng(0)

    def values(*shape: int) -> torch.Tensor:
        bits = rng.integers(0, 1 << 16, shape, dtype=np.uint16)
        bits &= 0xBFFF  # clear the exponent's highest bit: finite, below 2
        return torch.from_numpy(bits.view(np.float16))

    if options.form != "shards":
        published.make(folder, options.form, blocks, options, values)
        return
    step.mkdir(parents=True)
    norms = {f"{name}.{last}": values(hidden) for name in NORMS for last in ("weight", "bias")}
    final = {f"norm.{last}": values(hidden) for last in ("weight", "bias")}
    for layer in track(
        [0, *range(2, blocks + 2), blocks + 3, blocks + 4],
        description="making the checkpoint",
        console=Console(stderr=True),
    ):
        for rank in range(ranks):
            if layer == 0:
                tensors = {"word_embeddings.weight": values(rows // ranks, hidden)}
            elif layer == blocks + 4:
                tensors = {"final_linear.weight": values(rows // ranks, hidden)}
            elif layer == blocks + 3:
                tensors = final
            else:
                tensors = dict(norms)
                for name, (out, width) in MATRICES.items():
                    column = name in ("attention.dense", "mlp.dense_4h_to_h")
                    shape = (
                        (out * hidden, width * hidden // ranks) if column else (out * hidden // ranks, width * hidden)
                    )
                    tensors |= {f"{name}.weight": values(*shape), f"{name}.bias": values(shape[0])}
            torch.save(tensors, step / f"layer_{layer:02}-model_{rank:02}-model_states.pt")
    (folder / "latest").write_text("global_step0")
    (folder / "configs").mkdir()
    (folder / "configs" / "model.yml").write_text(YAML.format(blocks, hidden, options.heads))
    os.sync()  # otherwise the disk would still be writing this during the first conversion


NORMS = ("input_layernorm", "post_attention_layernorm")
MATRICES = {
    "attention.query_key_value": (3, 1),
    "attention.dense": (1, 1),
    "mlp.dense_h_to_4h": (4, 1),
    "mlp.dense_4h_to_h": (1, 4),
}
YAML = """{{
  # synthetic
  "num-layers": {}, "hidden-size": {}, "num-attention-heads": {},
  "pos-emb": "rotary", "rotary-pct": 0.25, "gpt-j-residual": true, "no-weight-tying": true,
}}
"""


def plain_write(file: Path, total: int, sync: bool = True) -> float:
    """Seconds to write `total` random bytes sequentially, by default with fsync at the end."""
    piece = np.random.default_rng(0).integers(0, 256, 8_000_000, dtype=np.uint8)
    began = time.perf_counter()
    with file.open("wb", buffering=0) as out:
        for start in range(0, total, piece.nbytes):
            out.write(piece[: total - start].data)
        if sync:
            os.fsync(out.fileno())
    seconds = time.perf_counter() - began
    file.unlink()
    return seconds


class Round(NamedTuple):
    """Peak of anonymous memory above the start, in bytes; seconds of the conversion, and mean of the plain writes.

    user, system: seconds of processor time of the conversion. plain_used: that of a plain write.
    cached, plain_cached: seconds of both without the disk.
    """

    peak: int
    seconds: float
    plain: float
    user: float
    system: float
    plain_used: float
    cached: float
    plain_cached: float


def watched(source: Path, target: Path, to: str, ranks: int) -> Round:
    """Convert in a separate process and sample its memory until it exits."""
    command = [sys.executable, "-m", "bench.neox_shards", "--ranks-written", str(ranks)]
    child = subprocess.Popen([*command, "--child", str(source), str(target), to], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    start = json.loads(child.stdout.readline())["anonymous"]
    peak = start
    while child.poll() is None:
        peak = max(peak, anonymous(child.pid))
        time.sleep(0.003)
    result = json.loads(child.stdout.readline())
    if child.returncode:
        raise SystemExit(f"the conversion to {to} failed")
    return Round(peak - start, **result)


def convert(source: str, target: str, to: str, ranks: int) -> None:
    """Body of the separate process: print its memory, convert between two plain writes, print the times.

    A virtual machine returns freed memory to its host after about two seconds, and writing to it again is several times
    slower. Therefore conversion and writes follow each other immediately, after one more write to warm up.
    """
    import torch  # noqa: F401

    from jaxmodels.convert.flax import write_flax
    from jaxmodels.convert.hf import write_hf
    from jaxmodels.convert.neox.write import write_neox
    from jaxmodels.convert.open import open_source
    from jaxmodels.convert.source import abstract
    from jaxmodels.neox import NeoXConfig
    from jaxmodels.process.allocator import keep_freed_memory

    keep_freed_memory()  # like the command
    abstract(NeoXConfig.pythia_14m())  # count JAX's own allocations as memory at start
    plain, total = Path(target).with_name("plain"), open_source(source).neox().nbytes()
    print(json.dumps({"anonymous": anonymous(os.getpid())}), flush=True)
    plain_write(plain, total)
    start = os.times()
    before = plain_write(plain, total)
    middle = os.times()

    def converted() -> float:
        began = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            opened = open_source(source).neox()
            if to == "neox":
                write_neox(opened, target, ranks)
            else:
                {"flax": write_flax, "hf": write_hf}[to](opened, target)
        return time.perf_counter() - began

    seconds = converted()
    end = os.times()
    shutil.rmtree(target)
    result = {"seconds": seconds, "plain": (before + plain_write(plain, total)) / 2}
    result |= {"user": end.user - middle.user, "system": end.system - middle.system}
    result["plain_used"] = middle.user + middle.system - start.user - start.system
    with without_disk():
        result["cached"] = converted()
    shutil.rmtree(target)
    print(json.dumps(result | {"plain_cached": plain_write(plain, total, sync=False)}), flush=True)


@contextlib.contextmanager
def without_disk() -> Iterator[None]:
    """Context in which nothing is flushed, nor written to disk early."""
    with (
        unittest.mock.patch("os.fsync"),
        unittest.mock.patch("jaxmodels.io.pipeline.sync_file_range", return_value=None),
    ):
        yield


def anonymous(pid: int) -> int:
    """Bytes of anonymous memory of a process; 0 if it has exited."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    main()
