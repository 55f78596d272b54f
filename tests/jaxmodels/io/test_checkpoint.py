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
import pytest
from flax import nnx

import jaxmodels
from jaxmodels.layers import Fixed, Linear
from jaxmodels.transformer import AutoregressiveTransformer
from jaxmodels.weights.names import flat_arrays
from tests.common import language_model

ROOT = Path(__file__).parents[3]
ATTENTION = "fixed_random+vanilla+factorized_dense"


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
        assert path.name == "config.json"
        assert (path.parent / "params").exists()  # so the arrays were written
        raise error

    before = contents(copy.parent)
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

    monkeypatch.setattr("jaxmodels.io.atomic.Path.rename", failing)
    with pytest.raises(OSError, match=r"busy.*copy"):
        jaxmodels.save(model, copy, overwrite=True)
    assert contents(copy.parent) == before
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_the_disk_has_everything_before_the_old_one_goes(model, copy, monkeypatch):
    """Every file and folder before the rename, the folder around them after it, and only then the removal."""
    events, fsync, rename, rmtree = [], os.fsync, Path.rename, shutil.rmtree
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_ino), fsync(fd))[1])
    monkeypatch.setattr(Path, "rename", lambda a, b: (events.append("rename"), rename(a, b))[1])
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: (events.append("removal"), rmtree(*a, **k))[1])
    jaxmodels.save(model, copy, overwrite=True)
    monkeypatch.undo()
    last = len(events) - 1 - events[::-1].index("rename")
    assert {path.stat().st_ino for path in (copy, *copy.rglob("*"))} <= set(events[:last])
    assert events[last + 1 :] == [copy.parent.stat().st_ino, "removal"]


def test_a_symbolic_link_stays_one(model, copy, tmp_path):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "link"
    link.symlink_to(copy)
    other = language_model("plain")
    jaxmodels.save(other, link, overwrite=True)
    assert link.is_symlink()
    assert_same_model(jaxmodels.load(copy), other)
    assert [path.name for path in link.parent.iterdir()] == ["link"]


def test_only_a_checkpoint_is_overwritten(model, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"photos\b.*global_step"):
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


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n_vocab": 29}, r"generator.projection.bias has shape \[23\], expected \[29\]"),
        ({"n_layers": 3}, r"missing encoder.layers.2.feed_forward.layer1.bias"),
        ({"n_layers": 1}, r"unexpected encoder.layers.1.feed_forward.layer1.bias"),
        ({"attention": "rotary"}, r"unexpected encoder.layers.0.self_attn.alpha"),
        ({"attention": ["rotary"]}, r"^config does not fit AutoregressiveTransformer: .+"),
        ({"n_vocab": "many"}, r"^config does not fit AutoregressiveTransformer: .+"),
        ({"n_vocab": None}, r"^config does not fit AutoregressiveTransformer: .+"),
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
    with pytest.raises(ValueError, match=r"copy.params\b"):
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


def test_refuses_damaged_arrays(saved, tmp_path):
    """In a process of its own: Orbax leaves coroutines behind that fail in whatever test comes next."""
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


def test_other_files_may_lie_beside(copy, model):
    (copy / "vocabulary.json").write_text("{}")  # what a training script keeps with a model
    assert_same_model(jaxmodels.load(copy), model)
