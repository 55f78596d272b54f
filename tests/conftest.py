import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

# The tests compile thousands of small programs and run each once or twice: this halves the time.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64():
    """Float64 and full matmul precision: for questions of mathematics, where rounding is no excuse."""
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield
