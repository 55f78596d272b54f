"""Comparable timings in one process: alternating calls, medians, and a line with machine and versions."""

import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

LIMIT = "limit"  # name of the time of the products alone, at the speed of large ones


def alternate(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time the functions in rounds of one call each, after one call of each to warm up: seconds by name.

    The machine's speed drifts. Alternating calls drift together, so their ratios are stable even if single times are
    not. Each function must return only when its work is done (block_until_ready).
    """
    if rounds < 1:
        raise SystemExit(f"rounds={rounds} must be at least 1")
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in track(range(rounds), description="timing", transient=True, disable=not sys.stdout.isatty()):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def with_limit(
    functions: Mapping[str, Callable[[], object]], rounds: int, flops: float, dtype: str = "float32"
) -> dict[str, list[float]]:
    """Seconds by name like `alternate`, and as LIMIT those of a number of operations in large matrix products."""
    product, share = large_product(flops, dtype)
    seconds = alternate({**functions, LIMIT: product}, rounds)
    seconds[LIMIT] = [second * share for second in seconds[LIMIT]]
    return seconds


def large_product(flops: float, dtype: str) -> tuple[Callable[[], object], float]:
    """Large matrix products, and a number of multiplications and additions as a multiple of theirs."""
    import jax

    # On a GPU ten in sequence, so that waiting for the result is a small part of the time.
    n, times = (2048, 1) if jax.default_backend() == "cpu" else (8192, 10)
    a, b = jax.random.normal(jax.random.key(0), (2, n, n), dtype)
    b = b / n**0.5
    product = jax.jit(lambda a, b: jax.lax.fori_loop(0, times, lambda _, a: a @ b, a))
    return lambda: product(a, b).block_until_ready(), flops / (2 * times * n**3)


def report(title: str, seconds: Mapping[str, list[float]], against: str) -> None:
    """Print medians and ranges, each with the median of its ratios to `against`, taken round by round."""
    table = Table(title=title, title_justify="left")
    for heading in ("", "median ms", "min – max", f"÷ {against}"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds[against], strict=True))
        spread = f"{milliseconds(min(times))} – {milliseconds(max(times))}"
        table.add_row(name, milliseconds(statistics.median(times)), spread, f"{ratio:.2f}")
    Console(width=100).print(table)


def milliseconds(seconds: float) -> str:
    """Milliseconds, with three digits at least."""
    return f"{1e3 * seconds:.{0 if seconds >= 0.1 else 1 if seconds >= 0.01 else 2}f}"


def stamp(threads: int, device: str = "cpu") -> str:
    """Processor, threads, versions and GPU, for the heading of a table."""
    packages = ("jax", "flax", "torch", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    line = f"{processor()}, {threads} threads; Python {platform.python_version()}, {versions}"
    if device == "cpu":
        return line

    import jax

    return f"{line}; {jax.devices(device)[0].device_kind}"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({os.cpu_count()} CPUs seen)"
