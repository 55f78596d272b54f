"""keep_freed_memory: pages that were touched once are not cleared again."""

import json
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource
import numpy as np
from jaxmodels.process.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(13_000_003)  # 104 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
without = faults()
assert keep_freed_memory()
faults()
print(json.dumps([without, faults()]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_used_again_without_the_kernel():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    without, with_it = json.loads(done.stdout)
    assert without > 10  # pages may be huge ones
    assert with_it < without / 10


TRIMMED = """
import json
from jaxmodels.process.allocator import return_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

blocks = [bytes(20_011) for _ in range(5_000)]  # too small to be mapped on their own
last = bytes(20_011)  # keeps the heap from shrinking by itself
before = resident()
del blocks
assert return_freed_memory()
print(json.dumps([before, resident()]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_blocks_are_returned():
    done = subprocess.run([sys.executable, "-c", TRIMMED], capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout)
    assert before - after > 50e6
