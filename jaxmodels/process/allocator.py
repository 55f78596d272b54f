"""glibc's malloc, for programs that repeatedly allocate and free large blocks."""

import ctypes
import sys

# glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Tell glibc's malloc not to return freed memory to the OS; returns False if the C library is not glibc.

    XLA on a CPU allocates a step's temporaries with malloc and frees them after it. By default glibc returns such large
    blocks to the kernel, which clears every page again in the next step; this takes a sixth of a small model's step.
    The same applies to the tensors of a conversion.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    # Allocate from the main heap, never trim it, and use no per-thread arenas, which hold at most 64 MB each.
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_ARENA_MAX: 1}
    done = [mallopt(name, value) for name, value in settings.items()]
    return all(done)


def return_freed_memory() -> bool:
    """Give freed blocks back to the OS, which glibc otherwise keeps; returns False if the C library is not glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    return trim is not None and bool(trim(0))
