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
