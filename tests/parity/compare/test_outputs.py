"""Names of outputs, and which output of one side is which of the other."""

import collections
import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers.modeling_outputs import BaseModelOutputWithPooling

from parity.compare.outputs import aligned, correspondence, named_leaves, unmatched, words

A, B, C = jnp.zeros((2, 3)), jnp.ones((2, 5)), jnp.ones(7)


@flax.struct.dataclass
class Struct:
    u: object
    v: object = None


@dataclasses.dataclass
class Data:
    u: object
    v: object = None


Named = collections.namedtuple("Named", "u v")
BOTH = [(A, B), [A, B], {"u": A, "v": B}, Struct(A, B), Data(A, B), Named(A, B), (A, None, B)]


def paired(theirs, ours):
    """The pairs of outputs by identity of the arrays."""
    left, right = named_leaves(theirs, jax.Array), named_leaves(ours, jax.Array)
    return [(left[a], right[b]) for a, b in correspondence(left, right).items()]


@pytest.mark.parametrize("theirs", BOTH, ids=lambda tree: type(tree).__name__)
@pytest.mark.parametrize("ours", BOTH, ids=lambda tree: type(tree).__name__)
def test_structures_of_two_arrays_correspond(theirs, ours):
    assert [(a is A, b is A) for a, b in paired(theirs, ours)] == [(True, True), (False, False)]


def test_a_model_output_corresponds_by_order_to_a_tuple():
    pairs = paired(BaseModelOutputWithPooling(last_hidden_state=A, pooler_output=B), (A, B))
    assert [(a is A, b is A) for a, b in pairs] == [(True, True), (False, False)]


@pytest.mark.parametrize("whole", [(A,), {"logits": A}, Struct(A), Data(A), BaseModelOutputWithPooling(A)])
def test_an_array_is_the_only_one_of_a_structure(whole):
    assert len(paired(A, whole)) == len(paired(whole, A)) == 1


def test_an_array_is_the_first_of_several_or_the_only_one_of_its_shape():
    assert list(correspondence({"output": A}, {"output[0]": A, "output[1]": B}).values()) == ["output[0]"]
    assert list(correspondence({"output[x]": B, "output[y]": A}, {"output": A})) == ["output[y]"]
    assert list(correspondence({"output[0]": B, "output[1]": B}, {"output": A})) == ["output[0]"]  # a wrong shape


def test_dicts_correspond_by_their_keys():
    theirs, ours = {"output[u]": A, "output[v]": B}, {"output[v]": B, "output[w]": A}
    assert correspondence(theirs, ours) == {"output[v]": "output[v]"}
    assert unmatched(theirs, ours) == [
        "PyTorch also returns output[u]; not compared",
        "the Flax module also returns output[w]; not compared",
    ]
    with pytest.raises(ValueError, match=r"output\[u\], .*; .*output\[w\]"):
        aligned({"output[w]": A, "output[x]": A}, {"output[u]": A, "output[v]": A})


def test_nested_structures_correspond_level_by_level():
    theirs = named_leaves({"y": A, "state": (B, C)}, jax.Array)
    ours = named_leaves((A, {"h": B, "c": C}), jax.Array)
    assert correspondence(theirs, ours) == {
        "output[y]": "output[0]",
        "output[state][0]": "output[1][h]",
        "output[state][1]": "output[1][c]",
    }


def test_channels_move_under_either_name():
    image = jnp.zeros((2, 5, 7, 3))
    like = {"output[y]": np.zeros((2, 3, 5, 7)), "output[z]": np.zeros(())}
    for pattern in ("output[[]y]", "output[y]"):
        assert aligned({"output": image}, like, [pattern])["output[y]"].shape == (2, 3, 5, 7)
    assert aligned({"output": image}, like, ["output"])["output[y]"].shape == image.shape  # moved before


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("output", ["output"]),
        ("output[a][0]", ["output", "a", "0"]),
        ("output[a[b]", ["output", "a[b"]),
        ("output[]", ["output", ""]),
        ("output[", ["output"]),
        ("output" + "[" * 10**6, ["output"]),
    ],
    ids=["one", "two keys", "a bracket", "empty", "no end", "a million"],
)
def test_the_keys_of_a_name(name, found):
    assert words(name) == found
