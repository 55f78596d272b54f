import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Read as torch is imported, also by processes that tests start: on small tensors a second thread of PyTorch's wins
# nothing, and waiting for it took a small training nine times the processor time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import pytest

# The tests compile thousands of small programs and run each once or twice: this halves the time, and XLA's older way
# with fusions, without MLIR, takes off another third where there still is one. Processes inherit it; one that does not
# know a flag ends at once.
if jax.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}"
jax.config.update("jax_disable_most_optimizations", True)
# Tracing makes millions of small objects that stay in JAX's caches. With Python's thresholds, collecting them takes
# 8 % of the suite's time.
gc.set_threshold(100_000, 50, 100)
CROWDED = 1.0e9  # bytes; above it a module's compiled programs are dropped before the next one begins


def resident_bytes() -> int:
    """Memory of this process, 0 if the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@pytest.fixture(autouse=True, scope="module")
def _memory_is_given_back() -> Iterator[None]:
    """Without it the compiled programs of the whole suite add up to several gigabytes in each worker."""
    yield
    if resident_bytes() > CROWDED:
        jax.clear_caches()
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
            ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture
def x64():
    """Float64 and full matmul precision: for questions of mathematics, where rounding is no excuse."""
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(autouse=True)
def _nothing_is_left_running():
    yield
    from tests.train_common import STARTED

    for process in STARTED:
        if process.poll() is None:
            process.kill()
        if not process.stdout.closed:
            process.communicate()
    STARTED.clear()


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory):
    """A folder for --compile-cache: what several runs of the tests compile, most of their time, is compiled once."""
    from jax.experimental.compilation_cache import compilation_cache

    yield tmp_path_factory.mktemp("compiled")
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
