"""`save`, `load` and `register`: round trips, atomic folders, damaged files, users' classes, sources of `load`."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import jaxmodels
from jaxmodels import models
from jaxmodels.convert.flax import write_flax
from jaxmodels.convert.open import load, open_source
from jaxmodels.convert.source import model_source
from jaxmodels.generate import generate
from jaxmodels.io import atomic
from jaxmodels.io.checkpoint import read_config, stored_arrays
from jaxmodels.io.steps import latest_step, problem, steps
from jaxmodels.layers import Fixed, Linear
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.sharding import make_mesh
from jaxmodels.transformer import AutoregressiveTransformer
from jaxmodels.weights.names import flat_arrays
from tests.common import language_model
from tests.jaxmodels.mlp import MLPLanguageModel, mlp

ROOT = Path(__file__).parents[2]
ATTENTION = "fixed_random+vanilla+factorized_dense"
V, B, S = 23, 3, 7


@pytest.fixture(scope="module")
def model():
    return language_model(ATTENTION)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    jaxmodels.save(model, folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_same_model(a, b):
    assert nnx.graphdef(a) == nnx.graphdef(b)
    chex.assert_trees_all_equal_shapes_and_dtypes(flat_arrays(a), flat_arrays(b))
    chex.assert_trees_all_equal(flat_arrays(a), flat_arrays(b))


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
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


def test_round_trip(model, saved):
    loaded = jaxmodels.load(saved)
    assert isinstance(loaded, AutoregressiveTransformer)
    assert_same_model(loaded, model)
    table = loaded.encoder.layers[0].self_attn.fixed_random.table
    assert isinstance(table, Fixed)
    assert json.loads((saved / "config.json").read_text()) == {
        "format": 1,
        "model": "AutoregressiveTransformer",
        "config": model.config(),
    }


def test_dtypes_are_kept(model, tmp_path):
    model = nnx.clone(model)
    model.generator.projection.kernel = nnx.Param(model.generator.projection.kernel[...].astype(jnp.bfloat16))
    model.generator.projection.bias = nnx.Param(model.generator.projection.bias[...].astype(jnp.float16))
    jaxmodels.save(model, str(tmp_path / "checkpoint"))
    assert_same_model(jaxmodels.load(str(tmp_path / "checkpoint")), model)


def test_float64_is_never_narrowed(tmp_path):
    jax.config.update("jax_enable_x64", True)
    try:
        model = language_model("plain")
        jaxmodels.save(model, tmp_path / "checkpoint")
        assert_same_model(jaxmodels.load(tmp_path / "checkpoint"), model)
    finally:
        jax.config.update("jax_enable_x64", False)
    for on in (False, True):
        with jax.enable_x64(on), pytest.raises(ValueError, match=r"jax_enable_x64.* src_embed.embedding"):
            jaxmodels.load(tmp_path / "checkpoint")


def test_refuses_a_folder_with_something_in_it(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        jaxmodels.save(model, tmp_path)
    with pytest.raises(ValueError, match="file"):
        jaxmodels.save(model, tmp_path / "notes.txt")
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_an_empty_folder_will_do(model, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    jaxmodels.save(model, tmp_path / "checkpoint")
    assert_same_model(jaxmodels.load(tmp_path / "checkpoint"), model)


def test_overwrite(copy):
    other = language_model("plain")
    jaxmodels.save(other, copy, overwrite=True)
    assert_same_model(jaxmodels.load(copy), other)
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_a_failure_leaves_nothing_behind_and_the_old_one_whole(model, copy, monkeypatch, error):
    def write_text(path, *_, **__):
        if path.name != "config.json":  # the folder's manifest
            return write(path, *_, **__)
        assert (path.parent / "params").exists()  # the arrays have been written
        raise error

    before, write = contents(copy.parent), Path.write_text
    monkeypatch.setattr("jaxmodels.models.Path.write_text", write_text)
    for folder in (copy, copy.parent / "new"):
        with pytest.raises(type(error)):
            jaxmodels.save(model, folder, overwrite=True)
    assert contents(copy.parent) == before
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


@pytest.mark.parametrize("fails", ["old", "new"])
def test_a_rename_that_fails_names_the_target_and_leaves_the_old_one_whole(model, copy, monkeypatch, fails):
    before, rename = contents(copy.parent), Path.rename

    def failing(path, other):
        if (str(other).endswith(".old")) == (fails == "old") and not str(path).endswith(".old"):
            raise OSError(16, "busy")
        return rename(path, other)

    monkeypatch.setattr("jaxmodels.io.atomic.exchange", lambda a, b: False)
    monkeypatch.setattr("jaxmodels.io.atomic.Path.rename", failing)
    with pytest.raises(OSError, match=r"busy.*copy"):
        jaxmodels.save(model, copy, overwrite=True)
    assert contents(copy.parent) == before
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_the_disk_has_everything_before_the_old_one_goes(model, copy, monkeypatch):
    """Files and folders are flushed before the rename, the parent folder after it; then the old one is removed."""
    events, fsync, exchange, rmtree = [], os.fsync, atomic.exchange, shutil.rmtree
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_ino), fsync(fd))[1])
    monkeypatch.setattr(atomic, "exchange", lambda a, b: (events.append("rename"), exchange(a, b))[1])
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: (events.append("removal"), rmtree(*a, **k))[1])
    jaxmodels.save(model, copy, overwrite=True)
    monkeypatch.undo()
    last = len(events) - 1 - events[::-1].index("rename")
    assert {path.stat().st_ino for path in (copy, *copy.rglob("*"))} <= set(events[:last])
    assert events[last + 1] == copy.parent.stat().st_ino
    assert set(events[last + 2 :]) == {"removal"}


def test_a_symbolic_link_stays_one(model, copy, tmp_path):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "link"
    link.symlink_to(copy)
    other = language_model("plain")
    jaxmodels.save(other, link, overwrite=True)
    assert link.is_symlink()
    assert_same_model(jaxmodels.load(copy), other)
    assert [path.name for path in link.parent.iterdir()] == ["link"]


def test_only_a_folder_of_this_program_s_is_overwritten(model, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"photos\b.*not written by this program"):
        jaxmodels.save(model, tmp_path / "photos", overwrite=True)
    assert contents(tmp_path) == {"photos/one.jpg": b"mine"}


def test_refuses_a_model_it_could_not_rebuild(tmp_path):
    with pytest.raises(ValueError, match=r"jaxmodels\.layers\.Linear.*jaxmodels\.register"):
        jaxmodels.save(Linear(3, 5, rngs=nnx.Rngs(0)), tmp_path / "checkpoint")
    namesake = type("AutoregressiveTransformer", (nnx.Module,), {})
    with pytest.raises(ValueError, match=r"AutoregressiveTransformer.*jaxmodels\.register"):
        jaxmodels.save(namesake(), tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"null",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"format": 1}',
        b'{"format": 1, "model": "AutoregressiveTransformer"}',
        b'{"format": 2, "model": "AutoregressiveTransformer", "config": {}}',
        b'{"format": 1, "model": "AutoregressiveTransformer", "config": {}}',
        b'{"format": 1, "model": "AutoregressiveTransformer", "config": null}',
        b'{"format": 1, "model": "AutoregressiveTransformer", "config": [1, 2]}',
        b'{"format": 1, "model": "os.system", "config": {}}',
        b'{"format": 1, "model": ["AutoregressiveTransformer"], "config": {}}',
    ],
    ids=lambda content: content.decode("latin-1")[-50:] or "empty",
)
def test_refuses_a_broken_config(copy, content):
    (copy / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config|format|model="):
        jaxmodels.load(copy)


@pytest.mark.parametrize("config", ["null", "[1, 2]", "7"])
def test_a_config_that_is_no_object_is_refused_before_it_is_used(tmp_path, config):
    (tmp_path / "config.json").write_text(f'{{"format": 1, "model": "NeoX", "config": {config}}}')
    with pytest.raises(ValueError, match=r"config\.json has config=.*must be an object"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n_vocab": 29}, r"generator.projection.bias has shape \[23\], expected \[29\]"),
        ({"n_layers": 3}, r"missing encoder.layers.2.feed_forward.layer1.bias"),
        ({"n_layers": 1}, r"unexpected encoder.layers.1.feed_forward.layer1.bias"),
        ({"attention": "rotary"}, r"unexpected encoder.layers.0.self_attn.alpha"),
        ({"attention": ["rotary"]}, r"config.json: config does not fit AutoregressiveTransformer: .+"),
        ({"n_vocab": "many"}, r"config.json: n_vocab='many'"),
        ({"n_vocab": None}, r"config.json: n_vocab=None"),
        ({"d_modell": 12}, r"d_modell"),
        ({"d_model": 0}, r"d_model=0"),
        ({"heads": 5}, r"heads=5"),
    ],
)
def test_refuses_a_configuration_of_another_model(copy, change, match):
    content = json.loads((copy / "config.json").read_text())
    content["config"] |= change
    (copy / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=match):
        jaxmodels.load(copy)


def test_refuses_what_is_no_checkpoint(copy, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "missing", copy / "config.json"):
        with pytest.raises(ValueError, match=re.escape(str(folder))):
            jaxmodels.load(folder)
    shutil.rmtree(copy / "params")
    with pytest.raises(ValueError, match=r"copy .*params"):
        jaxmodels.load(copy)


LOAD_EACH = """
import sys
import jaxmodels
for folder in sys.argv[1:]:
    try:
        jaxmodels.load(folder)
    except ValueError as error:
        print("refused", "params" in str(error))
    else:
        print("loaded")
"""


@pytest.mark.slow
def test_refuses_damaged_arrays(saved, tmp_path):
    """In a separate process: Orbax leaves coroutines behind that would fail in the next test."""
    folders = []
    for pattern in ("_METADATA", "manifest.ocdbt", "d/*", "ocdbt.process_0"):
        for remove in (False, True):
            folder = shutil.copytree(saved, tmp_path / str(len(folders)))
            folders.append(str(folder))
            damaged = list((folder / "params").rglob(pattern))
            assert damaged
            for path in damaged:
                if path.is_dir():
                    shutil.rmtree(path)
                elif remove:
                    path.unlink()
                else:
                    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    done = subprocess.run(
        [sys.executable, "-c", LOAD_EACH, *folders, str(saved)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.split("\n") == ["refused True"] * len(folders) + ["loaded", ""]


def test_a_checkpoint_may_contain_other_files(copy, model):
    (copy / "vocabulary.json").write_text("{}")  # saved with the model by training scripts
    assert_same_model(jaxmodels.load(copy), model)


def test_the_package_lists_its_contract():
    assert dir(jaxmodels) == ["__version__", "load", "register", "save"]
    assert jaxmodels.load is load
    with pytest.raises(AttributeError, match="'lode'"):
        _ = jaxmodels.lode


def test_a_registered_class_is_saved_and_loaded(registered, ids):
    content = json.loads((registered / "config.json").read_text())
    assert content["model"] == "tests.MLPLanguageModel"
    loaded = jaxmodels.load(registered)
    assert isinstance(loaded, MLPLanguageModel)
    chex.assert_trees_all_equal(flat_arrays(loaded), flat_arrays(mlp()))
    np.testing.assert_array_equal(loaded(ids), mlp()(ids))


@pytest.mark.slow
def test_a_registered_class_generates(registered, ids):
    model = jaxmodels.load(registered)
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


def test_load_names_a_class_that_is_not_registered(registered, tmp_path):
    folder = shutil.copytree(registered, tmp_path / "copy")
    (folder / "config.json").write_text(json.dumps({"format": 1, "model": "tests.Unknown", "config": {}}))
    with pytest.raises(ValueError, match=r"model='tests\.Unknown'.*AutoregressiveTransformer.*tests\.MLPLanguageModel"):
        jaxmodels.load(folder)


def test_dtype_casts_floating_arrays(registered):
    loaded = jaxmodels.load(registered, dtype="bfloat16")
    expected = jax.tree.map(lambda a: a.astype(jnp.bfloat16), flat_arrays(mlp()))
    chex.assert_trees_all_equal(flat_arrays(loaded), expected)
    chex.assert_trees_all_equal_dtypes(flat_arrays(loaded), expected)
    with pytest.raises(ValueError, match="dtype=int8"):
        jaxmodels.load(registered, dtype=jnp.int8)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_merged_of_a_registered_class_takes_no_arguments(registered, monkeypatch, dtype):
    monkeypatch.setattr(MLPLanguageModel, "merged", lambda self: self, raising=False)
    loaded = jaxmodels.load(registered, dtype=dtype)
    assert {array.dtype for array in flat_arrays(loaded).values()} == {jnp.dtype(dtype or "float32")}


def test_dtype_refuses_float64_without_x64(registered):
    with pytest.raises(ValueError, match=r"dtype=float64 .*jax_enable_x64"):
        jaxmodels.load(registered, dtype="float64")


def test_dtype_keeps_the_smallest_numbers(tmp_path):
    """XLA takes them for 0 on CPUs."""
    model = mlp()
    model.hidden.bias[...] = (
        model.hidden.bias[...].at[3].set(float(ml_dtypes.finfo(ml_dtypes.bfloat16).smallest_subnormal))
    )
    jaxmodels.save(model, tmp_path / "model")
    expected = np.asarray(model.hidden.bias[...]).astype(ml_dtypes.bfloat16)
    assert expected[3] > 0
    found = jaxmodels.load(tmp_path / "model", dtype="bfloat16").hidden.bias[...]
    np.testing.assert_array_equal(np.asarray(found), expected)


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


def test_shardings_are_a_mesh_or_a_function(registered):
    mesh = make_mesh("", jax.devices()[:1])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    asked = {}

    def place(path, shape):
        asked[path] = shape
        return sharding

    for shardings in (mesh, place):
        loaded = jaxmodels.load(registered, shardings=shardings)
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


def test_a_source_that_is_no_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is not a folder"):
        jaxmodels.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"config\.json"):
        models.load(tmp_path)


def test_an_array_has_one_name_in_a_folder(tmp_path):
    config = {"n_vocab": 7, "d_model": 8, "heads": 2, "d_ff": 11, "n_layers": 1}
    model = models.build("AutoregressiveTransformer", config)
    models.save(model, tmp_path / "model")
    shutil.move(tmp_path / "model" / "params", tmp_path / "orbax")
    arrays = {".".join(map(str, path)): np.asarray(array) for path, array in flat_arrays(model).items()}
    save_file(arrays, tmp_path / "model" / "params.safetensors")
    models.load(tmp_path / "model")
    shutil.move(tmp_path / "orbax", tmp_path / "model" / "params")
    for read in (models.load, stored_arrays, lambda folder: open_source(folder).model()):
        with pytest.raises(ValueError, match=r"model holds params and params\.safetensors"):
            read(tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "params")
    (tmp_path / "model" / "params.safetensors").unlink()
    save_file(arrays | {"encoder.norm.weight": np.zeros(8, np.float32)}, tmp_path / "model" / "params.safetensors")
    with pytest.raises(ValueError, match=r"model: 'encoder\.norm\.weight' is the name of two arrays"):
        models.load(tmp_path / "model")


def test_values_of_a_configuration_are_counted_at_any_depth():
    blocks = {"channels": [[64, 64], [128, {"classes": ["cat"] * 1000}]]}
    models.check_values(blocks)
    with pytest.raises(ValueError, match="more than 10,000 values"):
        models.check_values(blocks | {"more": {"names": [["a"] * 100] * 100}})
