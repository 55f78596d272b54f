"""How the C library's allocator treats the memory that programs free again and again."""

import ctypes
import sys

# glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Has the process keep the memory that it frees; False where the C library is not glibc and nothing is changed.

    XLA on a CPU takes a step's temporaries from malloc and frees them after it. glibc hands blocks that large back to
    the kernel, and the next step has every page of them cleared again: a sixth of the time of a small model's step. So
    it is with the tensors of a conversion.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    # from the one heap that grows and shrinks at its end, and does not shrink; other threads' arenas hold 64 MB at most
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_ARENA_MAX: 1}
    done = [mallopt(name, value) for name, value in settings.items()]
    return all(done)
