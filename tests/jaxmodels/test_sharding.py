"""Placement of models on eight host devices, in a process of its own: the device count is fixed when JAX starts."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxmodels.sharding import make_mesh, parameter_specs, parse_sizes, shardings

ROOT = Path(__file__).parents[2]


class Bare(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(6, 10, rngs=rngs)


class Ruled(Bare):
    sharding_rules = ((r"kernel", P("fsdp", "tensor")), (r"linear\.bias", P("tensor")))


SHAPES = {"linear.kernel": (6, 10), "linear.bias": (10,)}


def mesh(text, n=8):
    """Mesh over n copies of a device: enough to compute specs."""
    sizes = parse_sizes(text, n)
    return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))


def test_rules_give_the_specs():
    specs = parameter_specs(Ruled, SHAPES, mesh("fsdp=2,tensor=2"))
    assert specs == {"linear.kernel": P("fsdp", "tensor"), "linear.bias": P("tensor")}
    assert parameter_specs(Ruled(nnx.Rngs(0)), SHAPES, mesh("fsdp=2,tensor=2")) == specs
    assert parameter_specs(Bare, SHAPES, mesh("data=8")) == dict.fromkeys(SHAPES, P())


def test_a_model_that_the_mesh_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"Bare\b.*sharding_rules.*fsdp=2\b"):
        parameter_specs(Bare, SHAPES, mesh("fsdp=2"))
    with pytest.raises(ValueError, match=r"linear\.scale \[10\]"):
        parameter_specs(Ruled, SHAPES | {"linear.scale": (10,)}, mesh("fsdp=2"))
    with pytest.raises(ValueError, match=r"fsdp=4 .*6 of linear\.kernel \[6, 10\].*\b2 more"):
        parameter_specs(Ruled, SHAPES, mesh("fsdp=4,tensor=4", 16))


@pytest.mark.parametrize("text", ["fsdp", "rows=2", "fsdp=0", "fsdp=2,fsdp=2", "fsdp=-1"])
def test_a_mesh_of_another_form_is_refused(text):
    with pytest.raises(ValueError, match=f"mesh='{text}'"):
        parse_sizes(text, 8)


def test_a_mesh_of_too_many_devices_is_refused():
    for text in ("fsdp=3", "data=2,fsdp=2", "fsdp=16"):
        with pytest.raises(ValueError, match=rf"mesh='{text}'.*\b8\b"):
            parse_sizes(text, 8)


def test_shardings_has_the_tree_of_the_model():
    model = Bare(nnx.Rngs(0))
    found = shardings(model, make_mesh("", jax.devices()[:1]))
    assert jax.tree.structure(found) == jax.tree.structure(model)
    moved = jax.device_put(model, found)
    np.testing.assert_array_equal(moved.linear.kernel[...], model.linear.kernel[...])


ON_EIGHT = """
import sys
import jax, jax.numpy as jnp, numpy as np
import jaxmodels
from flax import nnx
from jaxmodels.generate import generate
from jaxmodels.sharding import make_mesh, shardings
from jaxmodels.weights.names import dotted, flat_arrays
from tests.jaxmodels.mlp import mlp

assert jax.device_count() == 8
mesh = make_mesh("fsdp=2,tensor=4")
model, ids = mlp(), jnp.asarray(np.random.default_rng(0).integers(0, 23, (7, 3)))

def check(placed):
    for path, array in flat_arrays(placed).items():
        np.testing.assert_array_equal(array, flat_arrays(model)[path])
    shapes = {dotted(path): array.addressable_shards[0].data.shape for path, array in flat_arrays(placed).items()}
    assert shapes["hidden.kernel"] == (24, 10), shapes
    assert shapes["hidden.bias"] == (10,), shapes
    assert shapes["embed.embedding"] == (23, 8), shapes
    assert shapes["out.bias"] == (23,), shapes

check(jax.device_put(model, shardings(model, mesh)))
out = shardings(jax.eval_shape(mlp), mesh)
born = jax.jit(mlp, out_shardings=out)()
assert {d for a in jax.tree.leaves(born) for d in a.devices()} == set(jax.devices())
assert flat_arrays(born)[("hidden", "kernel")].addressable_shards[0].data.shape == (24, 10)
jaxmodels.save(model, sys.argv[1])
loaded = jaxmodels.load(sys.argv[1], shardings=mesh)
check(loaded)
np.testing.assert_array_equal(generate(loaded, ids, 4), generate(model, ids, 4))
print("done")
"""


@pytest.mark.slow
def test_a_model_of_somebody_else_on_eight_devices(tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT, str(tmp_path / "model")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "done\n", done.stderr[-3000:]
