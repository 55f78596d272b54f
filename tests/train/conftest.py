import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.train_common import STARTED


@pytest.fixture(autouse=True)
def _nothing_is_left_running():
    yield
    for process in STARTED:
        if process.poll() is None:
            process.kill()
        if not process.stdout.closed:
            process.communicate()
    STARTED.clear()


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory):
    """A folder for --compile-cache: what several runs of the tests compile, most of their time, is compiled once."""
    yield tmp_path_factory.mktemp("compiled")
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
