"""A converter of the user's own as `names`."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx

import parity
from jaxmodels.convert import ConversionError
from tests.parity.compare.weights.pairs import EXACT, distance, weights

ROWS = np.random.default_rng(0).standard_normal((4, 6))


class Torch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3)

    def forward(self, x):
        return self.b(self.n(torch.tanh(self.a(x))))


class Nnx(nnx.Module):
    def __init__(self):
        self.x, self.y = (nnx.Linear(*sizes, rngs=nnx.Rngs(0)) for sizes in ((6, 5), (5, 3)))
        self.bn = nnx.BatchNorm(5, epsilon=1e-5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.y(self.bn(jnp.tanh(self.x(x))))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = jnp.tanh(linen.Dense(5, name="x")(x))
        return linen.Dense(3, name="y")(linen.BatchNorm(use_running_average=True, epsilon=1e-5, name="bn")(x))


def params(state):
    return {
        "x": {"kernel": state["a.weight"].T, "bias": state["a.bias"]},
        "bn": {"scale": state["n.weight"].numpy(), "bias": jnp.asarray(state["n.bias"].numpy())},
        "y": {"kernel": np.asarray(state["b.weight"]).T, "bias": state["b.bias"]},
    }


def nested(state):
    found = params(state)
    found["bn"] |= {"mean": state["n.running_mean"], "var": state["n.running_var"]}
    return found


def variables(state):
    stats = {"mean": state["n.running_mean"], "var": state["n.running_var"]}
    return {"params": params(state), "batch_stats": {"bn": stats}}


def flat(state):
    return {f"{part}.{name}": array for part, arrays in nested(state).items() for name, array in arrays.items()}


FORMS = {
    "nested": nested,
    "variables": variables,
    "dotted": flat,
    "paths": lambda state: {tuple(name.split(".")): array for name, array in flat(state).items()},
    "state": lambda state: nnx.State(nested(state)),
}


@pytest.mark.parametrize("make", [Nnx, Linen])
@pytest.mark.parametrize("convert", FORMS.values(), ids=FORMS)
def test_what_a_converter_may_return(convert, make):
    assert distance(Torch(), make(), ROWS, names=convert) < EXACT


@pytest.mark.slow
def test_gradients_are_compared_through_it():
    report = parity.check(Torch(), Nnx(), ROWS, names=nested, steps=2)
    assert report.passed, str(report)


def test_what_does_not_fit_is_named():
    def untransposed(state):
        return nested(state) | {"x": {"kernel": state["a.weight"], "more": state["a.bias"]}}

    with pytest.raises(ConversionError) as error:
        weights(Torch(), Nnx(), ROWS, names=untransposed)
    assert error.value.problems == {
        "missing": ["x.bias"],
        "unexpected": ["x.more (from the converter)"],
        "misshapen": ["x.kernel: the converter gives [5, 6], Flax has [6, 5]"],
    }


def test_a_converter_that_raises_is_named():
    def broken(state):
        return {"x": state["nothing"]}

    with pytest.raises(ValueError, match=r"names=broken.*KeyError.*nothing"):
        weights(Torch(), Nnx(), ROWS, names=broken)


def test_a_function_of_a_name_is_no_converter():
    found = weights(
        Torch(), Nnx(), ROWS, names=lambda name: name.replace("a.", "x.").replace("b.", "y.").replace("n.", "bn.")
    )
    assert type(found).__name__ == "Mapped"


class Gained(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.g = torch.nn.Linear(6, 6), torch.nn.Parameter(torch.randn(6))

    def forward(self, x):
        return self.a(x) * (1 + self.g)


class FlaxGained(nnx.Module):
    """x W / 8 + b, times g."""

    def __init__(self):
        self.a, self.g = nnx.Linear(6, 6, rngs=nnx.Rngs(0)), nnx.Param(jnp.zeros(6))

    def __call__(self, x):
        return (x @ self.a.kernel / 8 + self.a.bias) * self.g


def gained(state):
    return {"a": {"kernel": state["a.weight"].T * 8, "bias": state["a.bias"]}, "g": 1 + state["g"]}


def test_numbers_may_be_scaled_and_shifted():
    assert distance(Gained(), FlaxGained(), ROWS, names=gained) < EXACT
    found = weights(Gained(), FlaxGained(), ROWS, names=gained)
    assert found.untrained == {"a.weight"}
    assert [key for key in ("a.weight", "a.bias", "g") if found.carries(key)] == ["a.bias"]
    report = parity.check(Gained(), FlaxGained(), ROWS, names=gained, steps=2)
    assert report.passed, str(report)


def test_a_square_matrix_left_as_it_lies_differs():
    def wrong(state):
        return gained(state) | {"a": {"kernel": state["a.weight"] * 8, "bias": state["a.bias"]}}

    assert distance(Gained(), FlaxGained(), ROWS, names=wrong) > 0.1


class Folded(nnx.Module):
    def __init__(self):
        self.a, self.b = nnx.Linear(6, 5, rngs=nnx.Rngs(0)), nnx.Linear(5, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.b(jnp.tanh(self.a(x)))


def folded(state):
    """BatchNorm folded into the layer after it."""
    scale = state["n.weight"] / torch.sqrt(state["n.running_var"] + 1e-5)
    shift = state["n.bias"] - scale * state["n.running_mean"]
    return {
        "a": {"kernel": state["a.weight"].T, "bias": state["a.bias"]},
        "b": {"kernel": (state["b.weight"] * scale).T, "bias": state["b.bias"] + state["b.weight"] @ shift},
    }


def test_gradients_of_what_is_computed_are_not_compared():
    found = weights(Torch(), Folded(), ROWS, names=folded)
    assert found.uncompared == {"b.bias", "b.weight", "n.bias", "n.weight"}
    assert any("not compared" in note and "b.kernel" in note for note in found.notes)
    assert distance(Torch(), Folded(), ROWS, names=folded) < EXACT
    report = parity.check(Torch(), Folded(), ROWS, names=folded, steps=2)
    assert report.passed, str(report)


def test_layouts_are_the_converters_own():
    with pytest.raises(ValueError, match="layouts"):
        weights(Torch(), Nnx(), ROWS, names=nested, layouts={"a.weight": "o i -> i o"})


class Narrow(torch.nn.Module):
    """Weights in bfloat16, and a parameter without elements."""

    def __init__(self):
        super().__init__()
        self.a, self.empty = torch.nn.Linear(6, 5).bfloat16(), torch.nn.Parameter(torch.zeros(0, 6))

    def forward(self, x):
        return self.a(torch.cat([self.empty, x]).to(self.a.weight.dtype)).to(x.dtype)


class FlaxNarrow(nnx.Module):
    def __init__(self):
        self.a, self.empty = nnx.Linear(6, 5, rngs=nnx.Rngs(0)), nnx.Param(jnp.zeros((0, 6)))

    def __call__(self, x):
        return self.a(jnp.concatenate([self.empty[...], x]))


def widened(state):
    wide = {name: tensor.float().numpy() for name, tensor in state.items()}
    return {"a": {"kernel": wide["a.weight"].T, "bias": wide["a.bias"]}, "empty": wide["empty"]}


def test_a_converter_may_widen_and_carry_parameters_without_elements():
    found = weights(Narrow(), FlaxNarrow(), ROWS, names=widened)
    assert found.carries("a.weight")
    assert not found.notes
    assert distance(Narrow(), FlaxNarrow(), ROWS, names=widened) < EXACT
