"""Training compared step by step: every optimizer, and the first difference of a wrong one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import parity
from parity.measure.optimizers import OPTIMIZERS
from tests.parity.pairs import FlaxMLP, mlp


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_both_libraries_have_the_same_update(optimizer):
    run = parity.trajectory(*mlp(), optimizer=optimizer, steps=5, learning_rate=lambda step: 1e-2 / (1 + step))
    assert run.passed, str(run)
    kinds = run.by_kind()
    assert list(kinds) == ["loss", "gradients", *OPTIMIZERS[optimizer].moments, "parameters"]
    assert all(len(readings) == 5 for readings in kinds.values())
    assert run.losses["torch"] == pytest.approx(run.losses["flax"])
    assert run.parted is None


def test_a_wrong_update_parts_at_the_first_step_after_right_gradients():
    wrong = dataclasses.replace(OPTIMIZERS["rmsprop"], optax=lambda lr: optax.rmsprop(lr, decay=0.99))  # ε in the root
    run = parity.trajectory(*mlp(), optimizer=wrong, steps=3, learning_rate=1e-2)
    assert (run.parted.step, run.parted.kind) == (0, "parameters")


def test_a_wrong_moment_is_distinguished_from_a_wrong_update():
    wrong = dataclasses.replace(OPTIMIZERS["adam"], optax=lambda lr: optax.adam(lr, b2=0.99))
    run = parity.trajectory(*mlp(), optimizer=wrong, steps=2)
    assert (run.parted.step, run.parted.kind) == (0, "second moment")


def test_a_wrong_gradient_is_distinguished_from_a_wrong_optimizer():
    class Wrong(FlaxMLP):
        def __call__(self, x):
            y = super().__call__(x)
            return y * 1.001 - jax.lax.stop_gradient(y) * 0.001

    torch_module, _, x = mlp()
    run = parity.trajectory(torch_module, Wrong(rngs=nnx.Rngs(0)), x, optimizer="sgd", steps=2)
    assert (run.parted.step, run.parted.kind) == (0, "gradients")
    assert "step 0: gradients" in str(run)


def test_float32_is_compared_with_torchs_own_drift_and_has_no_limit():
    run = parity.trajectory(*mlp(), optimizer="momentum", steps=5, precision="float32")
    assert run.passed, str(run)
    assert all(np.isinf(check.limit) for check in run.checks())


def test_a_parameter_that_torch_does_not_train_is_frozen_despite_weight_decay():
    torch_module, flax_module, x = mlp()
    torch_module.up.bias.requires_grad_(False)
    run = parity.trajectory(torch_module, flax_module, x, optimizer="adamw", steps=3)
    assert run.passed, str(run)


def test_bad_arguments_are_named():
    pair = mlp()
    with pytest.raises(ValueError, match=r"optimizer='adamm'.*adamw"):
        parity.trajectory(*pair, optimizer="adamm")
    with pytest.raises(ValueError, match=r"steps=0\b.*1"):
        parity.trajectory(*pair, steps=0)
    with pytest.raises(ValueError, match="precision='half'"):
        parity.trajectory(*pair, precision="half")
    with pytest.raises(ValueError, match="torch_module"):
        parity.trajectory(*pair, zero_gradients=["*"])
    assert jnp.zeros(()).dtype == jnp.float32, "x64 is off again"
