"""Fixtures whose inputs would take the memory of a machine are refused before anything is computed."""

import numpy as np
import pytest
from flax import nnx

from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.transformer import AutoregressiveTransformer
from parity.compare.inputs import Inputs
from parity.golden.work import LARGEST, check_work, elements

MODELS = {
    "transformer": lambda: AutoregressiveTransformer(7, 4, 2, 5, 3, rngs=nnx.Rngs(0)),
    "neox": lambda: NeoX(NeoXConfig(7, 12, 3, 3, n_ff=5, rope_percentage=0.5, max_len=10**6), rngs=nnx.Rngs(0)),
}


def inputs(model: nnx.Module, length: int) -> Inputs:
    shape = (length, 1) if model.sequence_axis == 0 else (1, length)
    return Inputs.of((np.ones(shape, np.int32),))


@pytest.mark.parametrize("name", MODELS)
def test_a_long_sequence_is_refused_before_it_is_computed(name):
    model = nnx.eval_shape(MODELS[name])
    check_work(model, inputs(model, 100))
    with pytest.raises(ValueError, match=r"inputs/input 0 \[.*1000000.*\]; fixtures are compared up to"):
        check_work(model, inputs(model, 1_000_000))


def test_elements_of_scans_count_as_often_as_they_are_made():
    import jax
    import jax.numpy as jnp

    def call(x):
        return jax.lax.scan(lambda carry, row: (carry + row * 2, None), jnp.zeros(5), x)[0]

    short, long = (elements(jax.make_jaxpr(call)(jnp.zeros((n, 5))).jaxpr)[0] for n in (10, 1000))
    assert 90 * short < long < 110 * short
    assert elements(jax.make_jaxpr(lambda x: x[:, None] * x[None])(jnp.zeros(100)).jaxpr)[1] == 100**2
    assert LARGEST > 10**8
