"""The fast path: errors of a fast matmul precision, and two runs that differ."""

import jax
import jax.numpy as jnp
from flax import nnx

from parity.measure.precision import fast_path
from tests.parity.pairs import FlaxMLP, mlp


class Accelerated(FlaxMLP):
    """Rounds as an accelerator does: to bfloat16, unless the highest precision is set."""

    def __call__(self, x):
        strict = jax.config.jax_default_matmul_precision == "highest"
        return super().__call__(x if strict else x.astype(jnp.bfloat16).astype(x.dtype))


def test_the_errors_of_the_default_precision_are_reported():
    torch_module, _, x = mlp()
    found = fast_path(torch_module, Accelerated(rngs=nnx.Rngs(0)), x)
    output = next(cost for cost in found.costs if cost.kind == "output")
    assert output.strict < 4 < 1e3 < output.default < 1e6, "bfloat16 has 16 bits less than float32"
    assert output.torch < 4
    assert all(check.value == 0 and check.passed for check in found.checks)


def test_two_runs_that_differ_are_reported():
    calls = iter(range(10))

    class Restless(FlaxMLP):
        def __call__(self, x):
            return super().__call__(x) + 1e-4 * next(calls)  # another number at each compilation

    torch_module, _, x = mlp()
    found = fast_path(torch_module, Restless(rngs=nnx.Rngs(0)), x)
    assert next(check.value for check in found.checks if check.kind == "two runs: output") > 1e-5
