"""`register`, `save` and `load` for a class of somebody else, and the sources that `load` takes."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmodels
from jaxmodels import models
from jaxmodels.convert.flax import write_flax
from jaxmodels.convert.hf import save_hf
from jaxmodels.convert.neox import save_neox
from jaxmodels.convert.source import model_source
from jaxmodels.generate import generate
from jaxmodels.io.steps import latest_step, problem, steps
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.sharding import make_mesh
from jaxmodels.weights.names import flat_arrays
from tests.jaxmodels.mlp import MLPLanguageModel, mlp

V, B, S = 23, 3, 7


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlp") / "model"
    jaxmodels.save(mlp(), folder)
    return folder


@pytest.fixture(scope="module")
def ids():
    return jnp.asarray(np.random.default_rng(0).integers(0, V, (S, B)))


def checkpoint(run, step, model):
    """Step of a training run, complete."""
    folder = run / "checkpoints" / str(step)
    jaxmodels.save(model, folder / "model")
    files = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
    (folder / "complete.json").write_text(json.dumps({"format": 2, "step": step, "data": {}, "files": files}))
    return folder


def test_the_package_lists_its_contract():
    assert dir(jaxmodels) == ["__version__", "load", "register", "save"]
    assert jaxmodels.load is models.load
    with pytest.raises(AttributeError, match="'lode'"):
        _ = jaxmodels.lode


def test_a_registered_class_is_saved_and_loaded(saved, ids):
    content = json.loads((saved / "config.json").read_text())
    assert content["model"] == "tests.MLPLanguageModel"
    loaded = jaxmodels.load(saved)
    assert isinstance(loaded, MLPLanguageModel)
    chex.assert_trees_all_equal(flat_arrays(loaded), flat_arrays(mlp()))
    np.testing.assert_array_equal(loaded(ids), mlp()(ids))


def test_a_registered_class_generates(saved, ids):
    model = jaxmodels.load(saved)
    new = generate(model, ids, 5)
    text = ids
    for token in new:
        np.testing.assert_array_equal(token, model(text)[-1].argmax(axis=-1))
        text = jnp.concatenate([text, token[None]])
    start = jnp.array([0, 2, 5])
    ragged = generate(model, ids, 5, start=start)
    for row, begin in enumerate(start.tolist()):
        np.testing.assert_array_equal(ragged[:, row], generate(model, ids[begin:, row : row + 1], 5)[:, 0])


@pytest.mark.parametrize("missing", ["sequence_axis", "init_cache", "prefill", "decode"])
def test_generate_names_what_a_model_lacks(ids, missing):
    members = {name: getattr(MLPLanguageModel, name) for name in ("sequence_axis", "init_cache", "prefill", "decode")}
    members.pop(missing)
    other = type("Other", (nnx.Module,), members)()
    with pytest.raises(ValueError, match=rf"^model .*\bOther without {missing};") as caught:
        generate(other, ids, 5)
    assert "\n" not in str(caught.value)


def test_register_refuses_what_it_could_not_rebuild():
    with pytest.raises(ValueError, match=r"Bare\b.*config\(\)"):
        jaxmodels.register("tests.Bare")(type("Bare", (nnx.Module,), {}))
    for name in ("NeoX", "tests.MLPLanguageModel"):
        other = type("Other", (nnx.Module,), {"config": lambda self: {}})
        with pytest.raises(ValueError, match=f"name='{name}'"):
            jaxmodels.register(name)(other)
    with pytest.raises(ValueError, match="name=''"):
        jaxmodels.register("")
    assert "tests.Bare" not in models.names()
    assert jaxmodels.register("tests.MLPLanguageModel")(MLPLanguageModel) is MLPLanguageModel


def test_load_names_a_class_that_is_not_registered(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    (folder / "config.json").write_text(json.dumps({"format": 1, "model": "tests.Unknown", "config": {}}))
    with pytest.raises(ValueError, match=r"model='tests\.Unknown'.*AutoregressiveTransformer.*tests\.MLPLanguageModel"):
        jaxmodels.load(folder)


def test_dtype_casts_floating_arrays(saved):
    loaded = jaxmodels.load(saved, dtype="bfloat16")
    expected = jax.tree.map(lambda a: a.astype(jnp.bfloat16), flat_arrays(mlp()))
    chex.assert_trees_all_equal(flat_arrays(loaded), expected)
    chex.assert_trees_all_equal_dtypes(flat_arrays(loaded), expected)
    with pytest.raises(ValueError, match="dtype=int8"):
        jaxmodels.load(saved, dtype=jnp.int8)


def test_dtype_refuses_a_value_that_overflows(tmp_path):
    model = mlp()
    model.hidden.bias[...] = model.hidden.bias[...].at[3].set(1e5).at[4].set(jnp.inf)
    jaxmodels.save(model, tmp_path / "model")
    with pytest.raises(ValueError, match=r"hidden\.bias\b.*float16"):
        jaxmodels.load(tmp_path / "model", dtype="float16")
    model.hidden.bias[...] = model.hidden.bias[...].at[3].set(1)
    jaxmodels.save(model, tmp_path / "infinite")
    assert jnp.isinf(jaxmodels.load(tmp_path / "infinite", dtype="float16").hidden.bias[4])


def test_dtype_and_mesh_for_a_streamed_checkpoint(tmp_path):
    config = NeoXConfig(V, 12, 2, 3, rope_percentage=0.5, n_ff=10)
    model = NeoX(config, rngs=nnx.Rngs(0))
    write_flax(model_source(model), tmp_path / "flax")
    loaded = jaxmodels.load(tmp_path / "flax", dtype="bfloat16", shardings=make_mesh("", jax.devices()[:1]))
    chex.assert_trees_all_equal(flat_arrays(loaded), jax.tree.map(lambda a: a.astype(jnp.bfloat16), flat_arrays(model)))


def test_shardings_are_a_mesh_or_a_function(saved):
    mesh = make_mesh("", jax.devices()[:1])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    asked = {}

    def place(path, shape):
        asked[path] = shape
        return sharding

    for shardings in (mesh, place):
        loaded = jaxmodels.load(saved, shardings=shardings)
        assert all(array.sharding == sharding for array in flat_arrays(loaded).values())
        chex.assert_trees_all_equal(flat_arrays(loaded), flat_arrays(mlp()))
    assert asked["hidden.kernel"] == (48, 40)


def test_a_run_loads_its_last_complete_checkpoint(tmp_path):
    for step in (5, 10, 100):
        folder = checkpoint(tmp_path, step, mlp(seed=step))
    (tmp_path / "checkpoints" / "120" / "model").mkdir(parents=True)  # interrupted
    assert steps(tmp_path / "checkpoints") == [5, 10, 100]
    chex.assert_trees_all_equal(flat_arrays(jaxmodels.load(tmp_path)), flat_arrays(mlp(seed=100)))
    file = folder / "model" / "config.json"
    file.write_text(file.read_text() + " ")  # damaged: a byte more than complete.json lists
    assert "config.json" in problem(folder)
    with pytest.warns(UserWarning, match=r"\b100\b.*config\.json"):
        loaded = jaxmodels.load(tmp_path, dtype="float32")
    chex.assert_trees_all_equal(flat_arrays(loaded), flat_arrays(mlp(seed=10)))
    assert latest_step(tmp_path)[0].name == "10"


def test_a_run_without_a_complete_checkpoint_is_refused(tmp_path):
    (tmp_path / "run" / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"run\b"):
        jaxmodels.load(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "5" / "complete.json").write_text('{"format": 1, "files": {}}')
    with pytest.raises(ValueError, match=r"run\b.*format 1\b"):
        jaxmodels.load(tmp_path / "run")


def test_formats_of_others_are_named(tmp_path):
    model = NeoX(NeoXConfig(V, 12, 2, 3, rope_percentage=0.5, n_ff=10), rngs=nnx.Rngs(0))
    save_hf(model, tmp_path / "hf")
    with pytest.raises(ValueError, match=r"source=.*hf.*load_hf"):
        jaxmodels.load(tmp_path / "hf")
    save_neox(model, tmp_path / "shards", model_parallel=1)
    for folder in (tmp_path / "shards", tmp_path / "shards" / "global_step0"):
        with pytest.raises(ValueError, match=r"source=.*shards.*load_neox"):
            jaxmodels.load(folder)


def test_a_source_that_is_no_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"source=.*nowhere"):
        jaxmodels.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"config\.json"):
        jaxmodels.load(tmp_path)
