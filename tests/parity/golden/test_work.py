"""Fixtures whose inputs would take the memory of a machine are refused before anything is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.transformer import AutoregressiveTransformer
from parity.compare.inputs import Inputs
from parity.compare.sides.adapters import traced
from parity.golden.fixture import SHIPPED, files_of, read, stems
from parity.golden.replay import rebuilt
from parity.golden.work import LARGEST, MOST, check_work, elements

MODELS = {
    "transformer": lambda: AutoregressiveTransformer(7, 4, 2, 5, 3, rngs=nnx.Rngs(0)),
    "neox": lambda: NeoX(NeoXConfig(7, 12, 3, 3, n_ff=5, rope_percentage=0.5, max_len=10**6), rngs=nnx.Rngs(0)),
}


def inputs(model: nnx.Module, length: int) -> Inputs:
    shape = (length, 1) if model.sequence_axis == 0 else (1, length)
    return Inputs.of((np.ones(shape, np.int32),))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_long_sequence_is_refused_before_it_is_computed(name):
    model = nnx.eval_shape(MODELS[name])
    check_work(model, inputs(model, 100), nbytes=1000)
    with pytest.raises(ValueError, match=r"inputs/input 0 \[.*1000000.*\]; at most 16,777,716 and .* for 1,000 bytes"):
        check_work(model, inputs(model, 1_000_000), nbytes=1000)


def test_the_limit_grows_with_what_is_stored():
    class Products(nnx.Module):
        def __call__(self, x):
            return x[:, None] * x[None]

    given = Inputs.of((np.ones(5_000, np.float32),))
    with pytest.raises(ValueError, match=r"up to 25,000,000 elements.* at most 16,777,716 and 1,073,805,824"):
        check_work(Products(), given, nbytes=1000)
    check_work(Products(), given, nbytes=10**8)


@pytest.mark.parametrize("stem", stems(SHIPPED), ids=lambda stem: stem.stem)
def test_shipped_fixtures_are_far_from_the_limits(stem):
    fixture = read(stem)
    arrays = elements(traced(rebuilt(fixture), fixture.inputs, (), jax.make_jaxpr).jaxpr)
    assert np.all(100 * np.array(arrays) < (MOST, LARGEST))
    assert 0.5 * files_of(stem)[0].stat().st_size < fixture.nbytes < files_of(stem)[0].stat().st_size


def test_elements_of_scans_count_as_often_as_they_are_made():
    def call(x):
        return jax.lax.scan(lambda carry, row: (carry + row * 2, None), jnp.zeros(5), x)[0]

    short, long = (elements(jax.make_jaxpr(call)(jnp.zeros((n, 5))).jaxpr)[0] for n in (10, 1000))
    assert 90 * short < long < 110 * short
    assert elements(jax.make_jaxpr(lambda x: x[:, None] * x[None])(jnp.zeros(100)).jaxpr)[1] == 100**2
