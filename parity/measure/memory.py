"""The memory that the readings of a check need, and what there is."""

import gc
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxmodels.process.allocator import return_freed_memory
from parity.compare.comparison import Comparison

# Bytes for each number in PyTorch's state_dict, at the peak: measured with a language model of 162 million, rounded up.
NEEDS = {"gradients": 32, "training": 45}
LARGE = 2**22  # numbers; collecting garbage of a smaller model takes longer than it is worth
CGROUP = Path("/sys/fs/cgroup")


def too_large(comparison: Comparison, readings: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Readings that do not fit into the available memory, each with the reason."""
    numbers = numbers_of(comparison)
    there = available()
    for reading, each in NEEDS.items():
        if reading in readings and numbers * each > there:
            yield reading, f"needs about {numbers * each / 2**30:.1f} GiB of memory; {there / 2**30:.1f} are available"


def free(comparison: Comparison) -> None:
    """After a side of a large model was dropped: modules refer to themselves, and malloc keeps what they leave."""
    if numbers_of(comparison) > LARGE:
        gc.collect()
        return_freed_memory()


def numbers_of(comparison: Comparison) -> int:
    """The numbers in PyTorch's state_dict."""
    state = {} if comparison.torch is None else comparison.torch.state_dict()
    return sum(tensor.numel() for tensor in state.values())


def available() -> int:
    """Bytes of memory that can be had without swapping, also in a container with a limit."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
    except (OSError, ValueError):  # no container, or "max"
        return free
    return min(free, max(0, limit - used))
