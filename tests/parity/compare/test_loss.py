"""The loss is the same function in both frameworks, and leaves out what is no number of the computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from parity.compare.loss import check_labels, jax_loss, masks, random_targets, torch_loss

RNG = np.random.default_rng(1)
Y = RNG.standard_normal((3, 5))


def both(outputs, labels=None, seed=0):
    """Loss and gradients of PyTorch and JAX."""
    targets = {} if labels is not None else random_targets(outputs, seed)
    theirs = {n: torch.tensor(a, requires_grad=a.dtype.kind in "fc") for n, a in outputs.items()}
    loss = torch_loss(
        theirs, None if labels is None else torch.tensor(labels), {n: torch.tensor(t) for n, t in targets.items()}
    )
    loss.backward()
    floats = {n: jnp.asarray(a) for n, a in outputs.items() if a.dtype.kind in "fc"}
    others = {n: jnp.asarray(a) for n, a in outputs.items() if n not in floats}
    value, gradients = jax.value_and_grad(lambda floats: jax_loss(floats | others, labels, targets))(floats)
    assert float(value) == pytest.approx(loss.item(), rel=1e-12, nan_ok=False)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(np.conj(gradient), theirs[name].grad.numpy(), rtol=1e-12, atol=1e-15)
    return loss.item(), {name: np.asarray(gradient) for name, gradient in gradients.items()}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_integers_and_booleans_have_no_part_in_it():
    loss, _ = both({"output[0]": Y, "output[1]": np.arange(7), "output[2]": Y > 0})
    assert loss == both({"output[0]": Y})[0] > 0


def test_complex_outputs_count_with_both_parts():
    z = Y + 1j * RNG.standard_normal(Y.shape)
    _, gradients = both({"output": z})
    assert (gradients["output"].imag != 0).all()


@pytest.mark.parametrize("constant", [np.nan, np.inf, -np.inf, -1e9, -1e4, np.finfo(np.float32).min, -1e30])
def test_masked_elements_are_left_out(constant):
    masked = RNG.random(Y.shape) > 0.4
    loss, gradients = both({"output": np.where(masked, constant, Y)})
    assert loss < 20
    assert ((gradients["output"] == 0) == masked).all()


def test_large_outputs_are_no_masks():
    assert not masks(1e8 * Y).any()
    assert not masks(np.array([1e12])).any()
    assert not masks(np.geomspace(1e-9, 1e9, 13)).any()
    assert not masks(np.arange(5)).any()


def test_outputs_that_flax_lacks_have_no_targets():
    outputs = {"output[0]": Y, "output[1]": Y}
    targets = random_targets(outputs, 0, {"output": Y})
    assert [np.isnan(target).all() for target in targets.values()] == [False, True]


def test_an_output_of_another_shape_is_left_out():
    targets = random_targets({"output": Y}, 0)
    assert jax_loss({"output": jnp.zeros((5, 3))}, None, targets) == 0


@pytest.mark.slow
def test_ignored_labels_and_masked_logits():
    logits = np.where(np.arange(5) == 2, -np.inf, Y)
    loss, _ = both({"output": logits}, np.array([1, -100, 4]))
    assert loss == pytest.approx(both({"output": logits[[0, 2]]}, np.array([1, 4]))[0])


@pytest.mark.parametrize(
    ("outputs", "chosen"),
    [
        ({"output[0]": Y.sum(1), "output[1]": Y}, "output[1]"),
        ({"output[a]": Y, "output[logits]": Y}, "output[logits]"),
        ({"output[10]": Y, "output[2]": Y}, "output[2]"),
        ({"output[0]": np.zeros((3, 5), int), "output[1]": Y}, "output[1]"),
    ],
)
def test_labels_belong_to_the_output_of_their_leading_shape(outputs, chosen):
    assert check_labels(np.array([0, 1, 2]), outputs) == [f"the loss is the cross-entropy of {chosen}"]


def test_classes_may_be_the_second_axis():
    image = RNG.standard_normal((2, 3, 5, 7))
    labels = RNG.integers(0, 3, (2, 5, 7))
    expected = torch.nn.functional.cross_entropy(torch.tensor(image), torch.tensor(labels)).item()
    assert both({"output": image}, labels)[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        ([5, 0, 0], "labels=5 must.* 0 to 4"),
        ([-1, 0, 0], "labels=-1"),
        ([-100] * 3, "all are -100"),
        ([0, 0], r"\[2\].*\[3, 5\]"),
    ],
)
def test_labels_that_are_no_classes_are_named(labels, named):
    with pytest.raises(ValueError, match=named):
        check_labels(np.array(labels), {"output": Y})
