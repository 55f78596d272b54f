"""LoRA: the active adapter, the merged model, and a training step over frozen weights."""

import dataclasses
import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxmodels
from jaxmodels import command
from jaxmodels.convert.flax import open_flax
from jaxmodels.convert.operations import float64_allowed
from jaxmodels.models import load_saved
from jaxmodels.neox import NeoX, quantize
from jaxmodels.neox.lora import TARGETS, LoRA, LoRANeoX
from jaxmodels.training.plan.flops import count, of_step
from jaxmodels.training.step import Numerics, Program
from jaxmodels.weights.names import flat_arrays, with_arrays
from tests.common import assert_close, filled, run
from tests.jaxmodels.neox.common import CONFIG, ids, neox
from tests.train_common import program

SOME, ALL = LoRA(3, 5.0, ("dense_4h_to_h", "dense")), LoRA(2, 7.0, tuple(TARGETS))
TOKENS = np.asarray(ids())


def adapted(lora: LoRA = SOME, stacked: bool = True, dtype=None) -> LoRANeoX:
    """Model with every array drawn at random, those of the adapter included; the base in a dtype."""
    made = filled(lambda: LoRANeoX(CONFIG, lora, rngs=nnx.Rngs(0)), scale=0.3)
    arrays = {p: a if dtype is None or "lora" in str(p[-1]) else a.astype(dtype) for p, a in flat_arrays(made).items()}
    made = with_arrays(made, arrays)
    return made if stacked else made.unstacked()


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_merged_model_equals_the_active_adapter():
    model = adapted()
    merged = model.merged()
    assert type(merged) is NeoX
    base = {path: a for path, a in flat_arrays(model).items() if "lora" not in str(path[-1])}
    changed = {path for path, array in flat_arrays(merged).items() if (array != base[path]).any()}
    assert changed == {("layers", *TARGETS[name], "kernel") for name in SOME.targets}
    expected = run(merged, ids())
    listed = model.unstacked()
    for logits in (run(model, ids()), run(listed, ids())):
        assert_close(logits, expected)
    cache = listed.init_cache(ids().shape[0], ids().shape[1])
    last, _ = jax.jit(LoRANeoX.prefill)(listed, ids(), cache)
    assert_close(last, expected[:, -1])


@pytest.mark.slow
def test_a_new_adapter_changes_nothing():
    base = neox()
    model = LoRANeoX.of(base, ALL, seed=3)
    np.testing.assert_allclose(run(model, ids()), run(base, ids()), atol=1e-5)
    for path, array in flat_arrays(model.merged()).items():
        np.testing.assert_array_equal(array, flat_arrays(base)[path])
    a = flat_arrays(model)["layers", "attention", "qkv_lin", "lora_a"]
    bound = 1 / math.sqrt(CONFIG.n_hidden)  # PEFT's kaiming_uniform_(A, a=√5)
    assert a.shape == (CONFIG.n_layers, CONFIG.n_hidden, 2)
    assert 0.9 * bound < np.abs(a).max() <= bound
    assert abs(np.std(a) / (bound / math.sqrt(3)) - 1) < 0.2
    other = flat_arrays(LoRANeoX.of(base, ALL, seed=4))["layers", "attention", "qkv_lin", "lora_a"]
    assert (a != other).all()


@pytest.mark.slow
def test_an_adapter_is_saved_beside_the_base_and_merged_on_loading(tmp_path):
    model = adapted(stacked=False, dtype=jnp.float16)
    jaxmodels.save(model, tmp_path / "model")
    active = load_saved(tmp_path / "model")
    assert type(active) is LoRANeoX
    assert active.lora == SOME
    for path, array in flat_arrays(model).items():
        np.testing.assert_array_equal(flat_arrays(active)[path], array)
    loaded = jaxmodels.load(tmp_path / "model")
    assert type(loaded) is NeoX
    assert not loaded.is_stacked
    assert {array.dtype for array in flat_arrays(loaded).values()} == {jnp.dtype("float16")}
    at = ("layers", 1, "attention", "output")
    kernel, a, b = (np.asarray(flat_arrays(model)[*at, name], np.float64) for name in ("kernel", "lora_a", "lora_b"))
    exact = kernel + 5 / 3 * a @ b
    got = np.asarray(flat_arrays(loaded)[*at, "kernel"])
    assert (np.abs(got - exact) <= 0.51 * np.spacing(np.abs(got))).all()
    wide = flat_arrays(jaxmodels.load(tmp_path / "model", dtype="float32"))[*at, "kernel"]
    np.testing.assert_allclose(wide, exact, atol=1e-6)


def active_in(model: LoRANeoX, dtype: str) -> LoRANeoX:
    return with_arrays(model, {path: array.astype(dtype) for path, array in flat_arrays(model).items()})


def lora_program(dtype: str = "float16", compute: str = "float32", **sizes) -> Program:
    config = dataclasses.replace(CONFIG, **sizes)

    def make() -> LoRANeoX:
        return active_in(LoRANeoX(config, ALL, rngs=nnx.Rngs(0)), dtype)

    numerics = Numerics(compute_dtype=compute)
    return program(optax.adam(1e-2), make, numerics=numerics, trains=lambda path: ".lora_" in path)


@pytest.mark.slow
def test_a_step_trains_the_adapter_alone_in_float32():
    made = lora_program("float16", "bfloat16")
    state = made.make_state(0)
    assert {name.rpartition(".")[2] for name in state.params} == {"lora_a", "lora_b"}
    assert {array.dtype for array in state.params.values()} == {jnp.dtype("float32")}
    assert {array.dtype for array in state.fixed.values()} == {jnp.dtype("float16")}
    assert made.all_parameters == CONFIG.parameters() + made.parameters
    before = jax.device_get(dataclasses.replace(state, key=None))
    step = made.lower_step({"tokens": TOKENS}).compile()
    for _ in range(2):  # B starts at zero, so that the first gradient of A is zero
        state, metrics = step(state, {"tokens": TOKENS}, np.zeros(1, bool))
    assert np.isfinite(metrics.loss)
    for name, array in before.fixed.items():
        np.testing.assert_array_equal(state.fixed[name], array)
    for name, array in before.params.items():
        assert (state.params[name] != array).any(), name
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(state.optimizer))


@pytest.mark.slow
def test_frozen_weights_cost_no_gradient_and_no_wide_copy():
    sizes = {"n_hidden": 60, "n_layers": 7, "n_ff": None}
    batch = {"tokens": TOKENS[:1]}
    narrow, wide = (lora_program(dtype, **sizes) for dtype in ("float16", "float32"))
    full = program(optax.adam(1e-2), lambda: NeoX(dataclasses.replace(CONFIG, **sizes), rngs=nnx.Rngs(0)))
    assert of_step(narrow, batch) < 0.75 * of_step(full, batch)
    assert count(narrow.gradients, narrow.abstract_state(), batch) == of_step(narrow, batch)
    used = [made.lower_step(batch).compile().memory_analysis().temp_size_in_bytes for made in (narrow, wide)]
    kernels = 7 * 12 * 60**2
    assert used[0] - used[1] < kernels  # a copy in float32 would be 4 bytes each


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_merged_weight_is_rounded_once(saved, tmp_path, dtype):
    """In the dtype that is asked for, whatever that of the kernels is: as a conversion writes it."""
    loaded = flat_arrays(jaxmodels.load(saved, dtype=dtype))
    model = load_saved(saved)
    for target, (owner, name) in TARGETS.items():
        linear = getattr(getattr(model.layers, owner), name)
        kernel = np.asarray(linear.kernel[...], np.float64)
        if target in SOME.targets:
            a, b = (np.asarray(factor[...], np.float64) for factor in (linear.lora_a, linear.lora_b))
            kernel = kernel + SOME.alpha / SOME.rank * a @ b
        found = loaded["layers", owner, name, "kernel"]
        assert found.dtype == dtype
        close = np.asarray(kernel.astype(np.float32).astype(found.dtype), np.float64)
        most = 0.6 if dtype == "float32" else 0.002  # a sum in float32 is not that of float64, rounded
        assert np.mean(np.asarray(found, np.float64) != close) < most
    assert command.main(["convert", "neox", str(saved), str(tmp_path / "out"), "--to", "flax", "--dtype", dtype]) == 0
    for path, array in flat_arrays(jaxmodels.load(tmp_path / "out")).items():
        np.testing.assert_array_equal(array, loaded[path])


def test_a_wide_adapter_of_a_narrow_base_is_rounded_once(tmp_path):
    """An adapter that is made with x64 is float64; the sum is rounded to what is written alone."""
    with float64_allowed():
        model = adapted(dtype=jnp.float16)
        wide = {p: a.astype(jnp.float64) if "lora" in str(p[-1]) else a for p, a in flat_arrays(model).items()}
        jaxmodels.save(with_arrays(model, wide), tmp_path / "model")
        tensors = open_flax(tmp_path / "model").tensors
        assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float64)}


def test_an_adapter_needs_a_plain_model_and_valid_settings():
    with pytest.raises(ValueError, match="quantized"):
        LoRANeoX.of(quantize(neox()), LoRA())
    with pytest.raises(ValueError, match="LoRANeoX"):
        LoRANeoX.of(adapted(), LoRA())
    with pytest.raises(ValueError, match="FrozenLinear"):
        quantize(adapted())
    for wrong in ({"rank": 0}, {"rank": 2.5}, {"rank": True}, {"alpha": 0}, {"alpha": float("nan")}):
        name = next(iter(wrong))
        with pytest.raises(ValueError, match=f"^{name}="):
            LoRA(**wrong)
    for targets in ((), ("query",), ("dense", "dense"), ("dense", "embed_in")):
        with pytest.raises(ValueError, match=r"^targets=.*query_key_value, dense, dense_h_to_4h, dense_4h_to_h"):
            LoRA(targets=targets)


HOSTILE = {
    "no object": 5,
    "a list": ["rank"],
    "another field": {"rank": 3, "target_modules": "(a+)+$"},
    "a target as a string": {"rank": 3, "targets": "dense"},
    "targets that are none": {"rank": 3, "targets": 5},
    "targets of other types": {"rank": 3, "targets": [["dense"], {}]},
    "a rank of 300 digits": {"rank": 10**300, "alpha": 5.0, "targets": list(SOME.targets)},
    "an alpha of 300 digits": {"rank": 3, "alpha": 10**300, "targets": list(SOME.targets)},
    "an alpha that float32 lacks": {"rank": 3, "alpha": 1e39, "targets": list(SOME.targets)},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    jaxmodels.save(adapted(dtype=jnp.float16), folder)
    return folder


def with_settings(saved, folder, **changed):
    """Copy of a saved model with other entries in its configuration."""
    shutil.copytree(saved, folder)
    about = json.loads((folder / "config.json").read_text())
    about["config"] |= changed
    (folder / "config.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_settings_of_another_kind_in_a_saved_model_are_refused(name, saved, tmp_path, capsys):
    folder = with_settings(saved, tmp_path / "model", lora=HOSTILE[name])
    with pytest.raises(ValueError, match=re.escape(str(folder / "config.json"))):
        jaxmodels.load(folder)
    assert command.main(["inspect", str(folder)]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert str(folder / "config.json") in shown


def test_an_adapter_that_overflows_is_refused_when_it_is_merged(saved, tmp_path):
    folder = with_settings(saved, tmp_path / "model", lora=dataclasses.asdict(LoRA(3, 1e9, SOME.targets)))
    said = rf"^{re.escape(str(folder))}: layers\.\S+\.kernel is not finite .*alpha=1e\+09, in dtype=float16$"
    with pytest.raises(ValueError, match=said):
        jaxmodels.load(folder)
    assert load_saved(folder).lora.alpha == 1e9
