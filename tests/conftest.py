"""Settings of JAX and fixtures for all tests."""

import contextlib
import ctypes
import gc
import os
import signal
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Read when torch is imported, also by child processes: on small tensors a second PyTorch thread gains nothing, and
# waiting for it multiplied the processor time of a small training by nine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import pytest

# The tests compile thousands of small programs and run each once or twice. Disabling most optimizations halves the
# time; XLA's older fusion emitters, without MLIR, save another third. XLA divides a program into up to 32 modules for
# as many threads, which takes a fifth more processor time than one. Child processes inherit the flags, and XLA exits at
# an unknown one, hence the version check.
if jax.__version_info__ < (0, 11):
    FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"
jax.config.update("jax_disable_most_optimizations", True)
# Tracing creates millions of small objects that stay in JAX's caches. With Python's default thresholds, garbage
# collection takes 8 % of the suite's time.
gc.set_threshold(100_000, 50, 100)
CROWDED = 1.0e9  # bytes added since the last time that compiled programs were dropped: then they are dropped again


def resident_bytes() -> int:
    """Resident memory of this process; 0 if the system does not report it."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def pytest_configure() -> None:
    """Let Ctrl-C interrupt, also child processes: a shell ignores it for what it started in the background."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Leave what the imports made, a million objects that stay, out of later garbage collections."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _begun() -> list[int]:
    """Resident memory after the last time that compiled programs were dropped."""
    return [resident_bytes()]


@pytest.fixture(autouse=True, scope="module")
def _clear_compiled_programs(_begun: list[int]) -> Iterator[None]:
    """Otherwise the compiled programs of the whole suite take several gigabytes in each worker.

    Dropping them takes a second: after every module that would be an eighth of the suite's time.
    """
    yield
    if resident_bytes() > _begun[0] + CROWDED:
        jax.clear_caches()
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)
        _begun[0] = resident_bytes()


@pytest.fixture
def x64():
    """Float64 and the highest matmul precision, for tests of the mathematics."""
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(autouse=True)
def _kill_child_processes():
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
    """A folder for --compile-cache, so that programs shared by several training runs compile once."""
    from jax.experimental.compilation_cache import compilation_cache

    yield tmp_path_factory.mktemp("compiled")
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
