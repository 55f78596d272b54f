"""`parity.Function` with the real libraries: Equinox, Haiku, penzai."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import parity

KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((5, 3))


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.ReLU(), torch.nn.LayerNorm(7), torch.nn.Linear(7, 2))


def checked(apply, params, names, scale=1.001):
    """The port agrees, and one that is off by a thousandth does not."""
    report = parity.check(net(), parity.Function(apply, params), X, names=names, steps=1)
    assert report.passed, str(report)
    wrong = parity.Function(lambda params, x: apply(params, x) * scale, params)
    assert parity.check(net(), wrong, X, names=names, steps=0).value("output", "float64") > 1e6


@pytest.mark.slow
def test_equinox():
    eqx = pytest.importorskip("equinox", reason="equinox is not installed (extra: libraries)")
    keys = jax.random.split(KEY)
    layers = [eqx.nn.Linear(3, 7, key=keys[0]), eqx.nn.Lambda(jax.nn.relu), eqx.nn.LayerNorm(7)]
    model = eqx.nn.Sequential([*layers, eqx.nn.Linear(7, 2, key=keys[1])])
    checked(eqx.filter_jit(lambda model, x: jax.vmap(model)(x)), model, {str(i): f"layers.{i}" for i in range(4)})
    with pytest.raises(ValueError, match=r"flax_module=Sequential\b.*parity\.Function"):
        parity.check(net(), model, X)


def test_equinox_convolutions_lie_as_in_pytorch():
    eqx = pytest.importorskip("equinox", reason="equinox is not installed (extra: libraries)")
    model = eqx.nn.Conv1d(3, 3, 3, padding=1, key=KEY)  # as many channels as steps of the window
    port = parity.Function(lambda model, x: jax.vmap(model)(x), model)
    x = np.random.default_rng(0).standard_normal((2, 3, 7))
    report = parity.check(torch.nn.Conv1d(3, 3, 3, padding=1), port, x, steps=0)
    assert report.passed, str(report)


@pytest.mark.slow
def test_haiku():
    hk = pytest.importorskip("haiku", reason="dm-haiku is not installed (extra: libraries)")

    def forward(x):
        x = jax.nn.relu(hk.Linear(7, name="up")(x))
        return hk.nets.MLP([2], name="mlp")(hk.LayerNorm(-1, True, True, name="norm", eps=1e-5)(x))

    transformed = hk.without_apply_rng(hk.transform(forward))
    params = transformed.init(KEY, jnp.zeros((5, 3)))
    checked(transformed.apply, params, {"0": "up", "2": "norm", "3": "mlp/~/linear_0"})


@pytest.mark.slow
def test_haiku_square_matrices_and_tables():
    hk = pytest.importorskip("haiku", reason="dm-haiku is not installed (extra: libraries)")
    transformed = hk.without_apply_rng(hk.transform(lambda ids: hk.Linear(3, name="l")(hk.Embed(3, 3, name="e")(ids))))
    ids = np.array([[0, 2], [1, 0]])
    port = parity.Function(transformed.apply, transformed.init(KEY, ids))
    torch.manual_seed(0)
    report = parity.check(
        torch.nn.Sequential(torch.nn.Embedding(3, 3), torch.nn.Linear(3, 3)),
        port,
        ids,
        names={"0": "e", "1": "l"},
        steps=0,
    )
    assert report.passed, str(report)


@pytest.mark.slow
def test_penzai():
    pytest.importorskip("penzai", reason="penzai is not installed (extra: libraries)")
    from penzai import pz

    def affine(name, inputs, outputs):
        config = {"input_axes": {"x": inputs}, "output_axes": {"y": outputs}}
        return [pz.nn.Affine.from_config(name=name, init_base_rng=KEY, **config), pz.nn.RenameAxes("y", "x")]

    norm = pz.nn.LayerNorm.from_config(name="n", init_base_rng=KEY, across_axes={"x": 7}, epsilon=1e-5)
    model = pz.nn.Sequential([*affine("a", 3, 7), pz.nn.Elementwise(jax.nn.relu), norm, *affine("b", 7, 2)])
    names = {
        "0.weight": "sublayers.0.sublayers.0.weights",
        "0.bias": "sublayers.0.sublayers.1.bias",
        "2.weight": "sublayers.3.sublayers.1.weights",
        "2.bias": "sublayers.3.sublayers.2.bias",
        "3.weight": "sublayers.4.sublayers.0.weights",
        "3.bias": "sublayers.4.sublayers.1.bias",
    }
    checked(lambda model, x: model(pz.nx.wrap(x).tag("b", "x")).untag("b", "x").unwrap(), model, names)
