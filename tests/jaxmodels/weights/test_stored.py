"""Abstract models: equal to those of `nnx.eval_shape`, and ended where the stored tensors do."""

import jax
import pytest
from flax import nnx

from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.retro import RetroModel
from jaxmodels.weights.names import flat_arrays
from jaxmodels.weights.stored import LARGER, SPARE, Stored, TooLarge, abstract, shapes_of

CONFIG = NeoXConfig(n_vocab=13, n_hidden=24, n_layers=3, n_heads=3)


class WithDropout(nnx.Module):
    """Module that keeps a stream of keys."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(3, 5, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


MODELS = {
    "stacked": lambda rngs: NeoX(CONFIG, rngs=rngs),
    "a list of layers": lambda rngs: NeoX(CONFIG, stacked=False, rngs=rngs),
    "retro": lambda rngs: RetroModel(7, 12, 3, [], 5, 3, 4, 20, rngs=rngs),
    "a module with a stream": lambda rngs: WithDropout(rngs=rngs),
}


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_of_the_model(name):
    make = MODELS[name]
    found, expected = shapes_of(make), nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(found)] == [
        (a.shape, a.dtype) for a in jax.tree.leaves(expected)
    ]


@pytest.mark.slow
def test_a_model_ends_with_the_stored_tensors():
    model = NeoX(CONFIG, stacked=False, rngs=nnx.Rngs(0))
    stored = Stored.of_model(flat_arrays(model))
    made = []

    def of(layers):
        def make(rngs):
            made.append(rngs)
            return nnx.List(nnx.Linear(1, 1, rngs=rngs) for _ in range(layers))

        return make

    most = LARGER * stored.tensors + SPARE
    with pytest.raises(TooLarge, match=f"here describes a model of more than {most:,} tensors; .* {stored.tensors}$"):
        abstract(of(10**9), stored, "here")
    assert len(made) == 1
    assert flat_arrays(abstract(lambda rngs: NeoX(CONFIG, stacked=False, rngs=rngs), stored, "here")).keys() == (
        flat_arrays(model).keys()
    )
