"""Arguments of a call: nested, constant, of one side; and how each side's call takes them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx

import parity
from parity.compare.arguments import fitted, modules
from parity.compare.inputs import Inputs, cast
from parity.compare.sides.functions import Function


@dataclasses.dataclass(frozen=True)
class State:
    hidden: object
    steps: int = 3


def echo(*args, **kwargs):
    return args, kwargs


def test_arrays_have_the_paths_of_nested_inputs():
    inputs = Inputs.of(
        {"x": np.ones(2), "state": {"h": jnp.ones(3), "c": [None, torch.ones(5)]}, "s": State(np.ones(7))}
    )
    assert {name: a.size for name, a in inputs.named().items()} == {
        "x": 2,
        "state[h]": 3,
        "state[c][1]": 5,
        "s[hidden]": 7,
    }
    assert list(Inputs.of((np.ones(2), (3, np.ones(2)))).named()) == ["input 0", "input 1[1]"]


def test_a_call_keeps_the_structure_and_the_constants():
    inputs = Inputs.of(
        {"x": np.ones(2), "mask": None, "size": (4, 5), "state": [np.ones(3), State(np.ones(2))], "p": 0.5}
    )
    (args, kwargs) = inputs.call(echo, {name: name for name in inputs.named()})
    assert args == ()
    assert kwargs == {
        "x": "x",
        "mask": None,
        "size": (4, 5),
        "state": ["state[0]", State("state[1][hidden]")],
        "p": 0.5,
    }
    assert inputs.replaced(inputs.named()).call(echo, inputs.named())[1]["size"] == (4, 5)


def test_lists_of_numbers_are_arrays_and_tuples_of_numbers_stay_tuples():
    inputs = Inputs.of({"ids": [[1, 2, 3], [4, 5, 6]], "kernel": (3, 3)})
    assert {name: a.shape for name, a in inputs.named().items()} == {"ids": (2, 3)}


def test_arrays_are_copies():
    x = np.ones(3)
    tensor = torch.ones(3)
    inputs = Inputs.of((x, tensor, torch.ones(2, dtype=torch.bfloat16)))
    x[:] = 0
    tensor.zero_()
    assert all((a == 1).all() for a in inputs.named().values())
    assert inputs.named()["input 2"].dtype == np.float32


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"x": np.zeros((0, 3))}, r"x\b.*\[0, 3\]"),
        ({"a": [np.ones(2), object()]}, r"a\[1\].*object"),
        ({"key": jax.random.key(0)}, "key.*flax_kwargs"),
        ({"x": None, "p": 0.5}, "no arrays"),
        ({"x": torch.ones(2, device="meta")}, r"x\b.*meta"),
    ],
)
def test_what_is_no_input_is_named(given, named):
    with pytest.raises(ValueError, match=f"inputs: got {named}"):
        Inputs.of(given)


def test_constants_of_one_side_reach_that_side_in_its_dtype():
    inputs = Inputs.of(np.ones(2), {"scale": np.ones(3), "flag": True}, {"bias": [jnp.ones(2)], "rngs": nnx.Rngs(7)})
    _, theirs = inputs.call(echo, {"input 0": torch.ones(2)}, "torch", torch.float64)
    assert theirs["scale"].dtype == torch.float64
    assert theirs["flag"] is True
    _, ours = inputs.call(echo, {"input 0": jnp.ones(2)}, "flax", jnp.bfloat16)
    assert ours["bias"][0].dtype == jnp.bfloat16
    ours["rngs"].params()
    _, again = inputs.call(echo, {"input 0": jnp.ones(2)}, "flax", jnp.bfloat16)
    assert int(again["rngs"].default.count[...]) == 0
    with pytest.raises(ValueError, match=r"flax_kwargs: x\b"):
        Inputs.of({"x": np.ones(2)}, flax_kwargs={"x": 1})
    with pytest.raises(ValueError, match="torch_kwargs=list"):
        Inputs.of(np.ones(2), ["flag"])


def test_pytorch_gets_clones_that_pass_gradients_on():
    x = torch.ones(3, requires_grad=True)
    y = Inputs.of(np.ones(3)).call(lambda x: x.mul_(2), {"input 0": x}, "torch")
    y.sum().backward()
    assert x.tolist() == [1, 1, 1]
    assert x.grad.tolist() == [2, 2, 2]


def test_complex_arrays_are_cast_rounded_and_varied_whole():
    z = np.array([1 + 2j, 1e-9 + 1j])
    inputs = Inputs.of(z)
    assert cast(z, jnp.float32).dtype == cast(jnp.asarray(z), jnp.bfloat16).dtype == np.complex64
    assert cast(np.arange(3), jnp.float32).dtype == np.int64
    (rounded,) = inputs.rounded(jnp.bfloat16).named().values()
    assert rounded.dtype == z.dtype
    assert rounded[1] == np.asarray(1e-9, jnp.bfloat16).astype(float) + 1j
    (varied,) = inputs.varied(1).named().values()
    assert (varied.imag != z.imag).all()
    assert Inputs.of((np.array(3), np.ones(2))).varied(1).named()["input 0"] == 3


class Torch(torch.nn.Module):
    def forward(self, x, mask=None, scale=1.0):
        return x


def flax_of(call):
    return type("Port", (nnx.Module,), {"__call__": call})()


def places(given, call, **own):
    return fitted(Inputs.of(given, **own), Torch(), flax_of(call))


def test_other_names_are_found_by_order_and_by_words():
    x, m = np.ones(2), np.ones(2) > 0
    found = places({"x": x, "mask": m}, lambda self, inputs, attention_mask=None, other=1, deterministic=True: None)
    assert found.places["flax"] == {"x": "inputs", "mask": "attention_mask"}
    assert found.places["torch"] == {}
    assert any("x as inputs" in note for note in found.notes)
    with pytest.raises(ValueError, match=r"factor\b.*PyTorch"):  # mask or scale?
        places({"inputs": x, "factor": 2.0}, lambda self, inputs, factor=1.0: None)
    assert places(x, lambda self, *, input_ids: None).places["flax"] == {"input 0": "input_ids"}
    assert places({"x": x}, lambda self, *args, **kwargs: None).places["flax"] == {"x": 0}


def test_an_input_without_a_place_is_named_with_what_both_calls_take():
    with pytest.raises(ValueError, match=r"mask\b.*Flax.*x, mask, scale.*takes x\b"):
        places({"x": np.ones(2), "mask": np.ones(2)}, lambda self, x: None)
    with pytest.raises(ValueError, match=r"got 2.*Flax.*takes x$"):
        places((np.ones(2), np.ones(2)), lambda self, x: None)
    with pytest.raises(ValueError, match=r"flax_kwargs: nope\b.*takes x$"):
        places(np.ones(2), lambda self, x: None, flax_kwargs={"nope": 1})
    assert places({"x": np.ones(2), "mask": None}, lambda self, x: None).places["flax"] == {"mask": ""}


def test_required_flags_have_evaluation_values_and_random_keys_are_made():
    found = places(np.ones(2), lambda self, x, deterministic, *, train=True, rngs, key: None)
    assert {name: found.flax_kwargs[name] for name in ("deterministic", "train")} == {
        "deterministic": True,
        "train": False,
    }
    assert isinstance(found.flax_kwargs["rngs"], nnx.Rngs)
    assert found.flax_kwargs.keys() == {"deterministic", "train", "rngs", "key"}
    assert any("deterministic=True" in note for note in found.notes)
    assert places(np.ones(2), lambda self, x, train=False: None).flax_kwargs == {}
    own = places(np.ones(2), lambda self, x, deterministic: None, flax_kwargs={"deterministic": False})
    assert own.flax_kwargs == {"deterministic": False}
    given = places({"x": np.ones(2), "deterministic": True}, lambda self, x, deterministic: None)
    assert (given.places["torch"], given.flax_kwargs) == ({"deterministic": ""}, {})


def test_a_linen_flag_of_none_is_filled_unless_a_field_has_it():
    class Port(linen.Module):
        deterministic: bool | None = None

        def __call__(self, x, deterministic=None):
            return x

    filled = [fitted(Inputs.of(np.ones(2)), Torch(), port).flax_kwargs for port in (Port(), Port(deterministic=True))]
    assert filled == [{"deterministic": True}, {}]


@pytest.mark.parametrize(
    ("torch_module", "flax_module", "named"),
    [
        (flax_of(echo), Torch(), r"torch_module=Port, flax_module=Torch\b.*order"),
        (Torch, flax_of(echo), "torch_module=the class Torch"),
        (Torch(), nnx.Linear, "flax_module=the class Linear"),
        (Torch(), echo, "flax_module=the function echo"),
        ({}, flax_of(echo), "torch_module=dict"),
        (Torch(), {}, "flax_module=dict"),
        (None, flax_of(echo), "torch_module=None"),
        (Torch(), None, "flax_module=None"),
        (torch.nn.Linear(2, 3, device="meta"), flax_of(echo), r"torch_module=Linear: weight\b.*meta"),
    ],
)
def test_wrong_modules_are_named(torch_module, flax_module, named):
    for reading in (parity.check, parity.suggest, parity.sweep, parity.trajectory):
        with pytest.raises(ValueError, match=named):
            reading(torch_module, flax_module, np.ones((2, 3)))


def test_a_lazy_module_is_refused_and_a_compiled_one_is_unwrapped():
    with pytest.raises(ValueError, match=r"LazyLinear: weight\b"):
        modules(torch.nn.LazyLinear(3), None)
    compiled, module = torch.nn.Module(), Torch()
    compiled._orig_mod = module
    assert modules(compiled, Function(echo, {}))[0] is module
