"""`parity.check` on small pairs of modules: its readings, the arguments it rejects, and its lack of side effects."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import parity
from jaxmodels import layers
from jaxmodels.convert import ConversionError, to_torch
from parity.compare.inputs import Inputs
from parity.compare.weights import Twins
from parity.measure.memory import NEEDS


class TorchNet(torch.nn.Module):
    """Two linear maps; an output of every kind of container, a parameter that nothing uses, a buffer."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(5, 7)
        self.norm = torch.nn.LayerNorm(7)
        self.second = torch.nn.Linear(7, 3, bias=False)
        self.unused = torch.nn.Parameter(torch.ones(2))
        self.register_buffer("shift", torch.full((3,), 0.5))

    def forward(self, x, hide):
        hidden = torch.tanh(self.norm(self.first(x)))
        return {"y": self.second(hidden) * hide + self.shift, "parts": (hidden, x.sum(dim=0))}


class FlaxNet(nnx.Module):
    def __init__(self, *, rngs):
        self.first = layers.Linear(5, 7, rngs=rngs)
        self.norm = layers.LayerNorm(7, rngs=rngs)
        self.second = layers.Linear(7, 3, bias=False, rngs=rngs)
        self.unused = nnx.Param(jnp.ones(2))
        self.shift = layers.Fixed(jnp.full((3,), 0.5))

    def __call__(self, x, hide):
        hidden = jnp.tanh(self.norm(self.first(x)))
        return {"y": self.second(hidden) * hide + self.shift[...], "parts": (hidden, x.sum(axis=0))}


@pytest.fixture
def pair():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    inputs = {"x": rng.standard_normal((11, 5)), "hide": rng.random((11, 1)) < 0.5}
    return TorchNet(), FlaxNet(rngs=nnx.Rngs(0)), inputs


def test_a_users_pair_agrees_in_every_reading(pair):
    report = parity.check(*pair)
    assert report.passed, str(report)
    readings = {(check.kind, check.precision) for check in report.checks}
    kinds = ("output", "parameter gradients", "input gradients")
    expected = {(kind, precision) for kind in kinds for precision in ("float64", "float32")}
    expected |= {("training loss", "float64"), ("trained parameters", "float64"), ("round trip", "bits")}
    assert readings == expected
    assert "agrees" in str(report)
    report.raise_if_failed()


def test_positional_inputs_and_a_single_array(pair):
    torch_module, flax_module, inputs = pair
    assert parity.check(torch_module, flax_module, list(inputs.values()), steps=1).passed
    assert parity.check(torch_module.first, flax_module.first, inputs["x"], steps=1).passed


def test_neither_module_nor_jax_is_changed(pair):
    torch_module, flax_module, inputs = pair
    before, flax_before = torch_module.state_dict(), to_torch(flax_module)
    before = {name: tensor.clone() for name, tensor in before.items()}
    parity.check(torch_module, flax_module, inputs, steps=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in torch_module.state_dict().items())
    assert torch_module.training
    assert all((array == flax_before[name]).all() for name, array in to_torch(flax_module).items())
    assert not jax.config.jax_enable_x64
    assert jax.config.jax_default_matmul_precision is None


class WrongGradient(FlaxNet):
    """The right output, and a gradient that is a thousandth off."""

    def __call__(self, x, hide):
        out = super().__call__(x, hide)
        return out | {"y": out["y"] * 1.001 - jax.lax.stop_gradient(out["y"]) * 0.001}


@pytest.mark.slow
def test_a_wrong_gradient_fails_though_the_output_is_right(pair):
    torch_module, _, inputs = pair
    report = parity.check(torch_module, WrongGradient(rngs=nnx.Rngs(0)), inputs)
    failed = {check.kind for check in report.checks if not check.passed}
    assert failed >= {"parameter gradients", "trained parameters", "training loss"}
    assert "output" not in failed
    assert (report.divergence.path, report.divergence.stage) == ("", "backward")


class Float32Inside(FlaxNet):
    """Rounds its output to float32."""

    def __call__(self, x, hide):
        out = super().__call__(x, hide)
        return out | {"y": out["y"].astype(jnp.float32).astype(x.dtype)}


def test_a_cast_inside_is_widened_and_named(pair):
    torch_module, _, inputs = pair
    report = parity.check(torch_module, Float32Inside(rngs=nnx.Rngs(0)), inputs, steps=1)
    assert report.passed, str(report)
    assert report.value("output", "float64") < 2
    (note,) = report.notes
    assert re.search(r"widened .* Flax: float32 at test_check\.py:\d+ \(Float32Inside\.__call__\)", note)


class Table(FlaxNet):
    """Multiplies its output by a table, rounded to float32 at construction, whose numbers are one in PyTorch."""

    off = 0.0

    def __init__(self, *, rngs):
        super().__init__(rngs=rngs)
        thirds = np.float32([1 / 3, 2 / 3, 1 / 7]) * np.float32(1 + self.off)
        self.table = nnx.Variable(jnp.asarray(thirds))

    def __call__(self, x, hide):
        out = super().__call__(x, hide)
        exact = np.array([1 / 3, 2 / 3, 1 / 7])
        return out | {"y": out["y"] * self.table[...] / exact}


class TableOff(Table):
    off = 1e-5


@pytest.mark.slow
def test_a_table_in_float32_passes_by_name_and_a_wrong_one_fails(pair):
    torch_module, _, inputs = pair
    settings = {"flax_only": ["table"], "steps": 1}
    report = parity.check(torch_module, Table(rngs=nnx.Rngs(0)), inputs, **settings)
    assert report.passed, str(report)
    assert report.value("output", "float64") > 1e5
    assert any(re.search(r"float32 inside: .*table \(float32 \[3\]\)", note) for note in report.notes), report.notes
    assert not parity.check(torch_module, TableOff(rngs=nnx.Rngs(0)), inputs, **settings).passed


class Slightly(FlaxNet):
    """A formula that is off by less than float32 shows, with nothing narrow inside."""

    def __call__(self, x, hide):
        out = super().__call__(x, hide)
        return out | {"y": out["y"] * (1 + 1e-10)}


@pytest.mark.slow
def test_a_difference_that_float32_would_hide_fails_if_nothing_narrow_explains_it(pair):
    torch_module, _, inputs = pair
    report = parity.check(torch_module, Slightly(rngs=nnx.Rngs(0)), inputs, steps=0)
    failed = [(c.kind, c.precision) for c in report.checks if not c.passed]
    assert ("output", "float64") in failed
    assert not any(precision == "float32" for _, precision in failed)


class TorchNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(7)

    def forward(self, x):
        return self.norm(x)


class Norm(nnx.Module):
    def __init__(self, *, rngs, **options):
        self.norm = nnx.LayerNorm(7, use_fast_variance=True, rngs=rngs, **options)

    def __call__(self, x):
        return self.norm(x)


@pytest.mark.slow
def test_a_less_stable_algorithm_agrees_with_a_note_and_a_wrong_one_differs():
    """The variance as a mean of squares loses digits for inputs far from zero, in every dtype alike."""
    x = np.random.default_rng(0).standard_normal((5, 7)) + 300
    report = parity.check(TorchNorm(), Norm(rngs=nnx.Rngs(0), epsilon=1e-5), x, steps=1)
    assert report.passed, str(report)
    assert report.value("output", "float64") > 32
    assert any(note.startswith("rounding: ") for note in report.notes)
    assert not parity.check(TorchNorm(), Norm(rngs=nnx.Rngs(0), epsilon=1e-6), x, steps=1).passed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_16_bit_dtypes_are_compared_on_request(pair, name):
    report = parity.check(*pair, half=(name,), steps=0)
    assert report.passed, str(report)
    assert 0 < report.value("output", name) <= 4
    assert {c.precision for c in report.checks} == {"float64", "float32", "bits", name}


class NarrowInside(FlaxNet):
    """Rounds its input to 8 bits, two of them a fraction, if that has 16."""

    def __call__(self, x, hide):
        narrow = jnp.float8_e5m2 if x.dtype.itemsize == 2 else x.dtype
        return super().__call__(x.astype(narrow).astype(x.dtype), hide)


@pytest.mark.slow
def test_an_error_in_16_bits_alone_fails_there_alone(pair):
    torch_module, _, inputs = pair
    report = parity.check(torch_module, NarrowInside(rngs=nnx.Rngs(0)), inputs, half=("bfloat16",), steps=0)
    assert [c.precision for c in report.checks if not c.passed] == ["bfloat16"]
    assert (report.divergence.path, report.divergence.dtype) == ("", "bfloat16")


class NaNInside(FlaxNet):
    def __call__(self, x, hide):
        out = super().__call__(x, hide)
        return out | {"y": out["y"].at[0, 0].set(jnp.nan)}


@pytest.mark.slow
def test_nan_fails(pair):
    torch_module, _, inputs = pair
    report = parity.check(torch_module, NaNInside(rngs=nnx.Rngs(0)), inputs, steps=1)
    assert not report.passed
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert json.loads(text)["passed"] is False


@pytest.mark.slow
def test_without_float64_every_reading_is_in_float32(pair):
    report = parity.check(*pair, float64=False)
    assert report.passed, str(report)
    assert {check.precision for check in report.checks} == {"float32", "bits"}
    assert {"training loss", "trained parameters"} <= {check.kind for check in report.checks}
    bad = parity.check(pair[0], NaNInside(rngs=nnx.Rngs(0)), pair[2], float64=False, steps=1)
    assert not bad.passed


@pytest.mark.slow
def test_constant_parameters_are_randomized_in_a_copy(pair):
    """A layer that ignores its bias agrees as long as the bias is zero."""
    torch_module, _, inputs = pair
    with torch.no_grad():
        torch_module.first.bias.zero_()

    class Biasless(FlaxNet):
        def __call__(self, x, hide):
            hidden = jnp.tanh(self.norm(x @ self.first.kernel[...]))
            return {"y": self.second(hidden) * hide + self.shift[...], "parts": (hidden, x.sum(axis=0))}

    flax_module = Biasless(rngs=nnx.Rngs(0))
    assert not parity.check(torch_module, flax_module, inputs, steps=1).passed
    report = parity.check(torch_module, flax_module, inputs, steps=1, randomize=False)
    assert report.value("output", "float64") < 2


@pytest.mark.slow
def test_declared_zero_gradients_must_be_zero(pair):
    torch_module, flax_module, inputs = pair
    assert parity.check(torch_module, flax_module, inputs, zero_gradients=["unused"], steps=1).passed
    report = parity.check(torch_module, flax_module, inputs, zero_gradients=["first.*"], steps=1)
    assert [check.kind for check in report.checks if not check.passed] == ["zero gradients"]
    with pytest.raises(ValueError, match=r"zero_gradients=\['nothing_like_it'\].*first\.bias"):
        parity.check(torch_module, flax_module, inputs, zero_gradients=["nothing_like_it"])


def test_weights_that_do_not_fit_are_an_error(pair):
    torch_module, flax_module, inputs = pair
    del torch_module.unused
    with pytest.raises(ConversionError, match="unused"):
        parity.check(torch_module, flax_module, inputs)


@pytest.mark.parametrize("inputs", [{}, [], {"x": np.array(["text"])}, np.zeros((0, 3))])
def test_inputs_that_are_no_arrays_are_an_error(pair, inputs):
    with pytest.raises(ValueError, match=r"inputs: got (x|input 0|no arrays)\b"):
        parity.check(pair[0], pair[1], inputs)


def test_training_batches_vary_and_are_reproducible():
    inputs = Inputs.of({"x": np.zeros((3, 2)), "ids": np.arange(5), "mask": np.array([True, False])})
    batches = [inputs.varied(step).named() for step in range(3)]
    assert not np.array_equal(batches[0]["x"], batches[1]["x"])
    np.testing.assert_array_equal(batches[2]["ids"], [2, 3, 4, 0, 1])
    np.testing.assert_array_equal(batches[1]["mask"], [True, False])
    np.testing.assert_array_equal(inputs.varied(1).named()["x"], batches[1]["x"])


def test_a_changed_bit_in_the_round_trip_is_seen(pair, monkeypatch):
    torch_module, flax_module, inputs = pair

    read = Twins.read

    def lossy(*args, **kwargs):  # gradients are read the same way, where one bit is within the limit
        return {k: np.nextafter(v, np.inf, dtype=v.dtype) for k, v in read(*args, **kwargs).items()}

    monkeypatch.setattr(Twins, "read", lossy)
    report = parity.check(torch_module, flax_module, inputs, steps=1)
    assert [check.kind for check in report.checks if not check.passed] == ["round trip"]


def test_a_parameter_that_torch_does_not_train_is_frozen_on_both_sides(pair):
    torch_module, flax_module, inputs = pair
    torch_module.first.bias.requires_grad_(False)
    report = parity.check(torch_module, flax_module, inputs, steps=2)
    assert report.passed, str(report)


def test_the_random_state_of_a_dropout_is_no_weight(pair):
    torch_module, flax_module, inputs = pair
    flax_module.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    assert parity.check(torch_module, flax_module, inputs, steps=1).passed


def test_outputs_of_other_names_are_an_error(pair):
    torch_module, _, inputs = pair

    class Renamed(FlaxNet):
        def __call__(self, x, hide):
            out = super().__call__(x, hide)
            return {"z": out["y"], "others": out["parts"]}

    with pytest.raises(ValueError, match=r"output\[y\]; .* output\[z\], "):
        parity.check(torch_module, Renamed(rngs=nnx.Rngs(0)), inputs)
    with pytest.raises(ValueError, match=r"flax_module=TorchNet\b"):
        parity.check(torch_module, torch_module, inputs)


def test_the_precision_flags_of_torch_are_restored(pair):
    torch.set_float32_matmul_precision("high")
    try:
        parity.check(*pair, steps=0)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_outputs_alone_are_read_on_request(pair):
    report = parity.check(*pair, readings=("output",))
    assert report.passed, str(report)
    assert {(c.kind, c.precision) for c in report.checks} == {("output", "float64"), ("output", "float32")}
    with pytest.raises(ValueError, match=r"readings=\['outputs'\].*training"):
        parity.check(*pair, readings=("outputs",))


def test_a_reading_that_does_not_fit_is_left_out_with_the_reason(pair, monkeypatch):
    numbers = sum(tensor.numel() for tensor in pair[0].state_dict().values())
    between = (NEEDS["gradients"] + NEEDS["training"]) // 2
    monkeypatch.setattr("parity.measure.memory.available", lambda: between * numbers)
    report = parity.check(*pair)
    assert report.passed, str(report)
    assert report.skipped.keys() == {"training"}
    assert re.search(r"needs about [\d.]+ GiB.*are available", report.skipped["training"])
    assert not any("train" in check.kind for check in report.checks)


def test_results_beyond_the_memory_limit_change_nothing(pair):
    checks = [parity.check(*pair, steps=2, memory_limit=limit).checks for limit in (2**30, 0)]
    assert checks[0] == checks[1]


def test_a_buffer_that_is_trained_in_flax_differs_and_no_part_is_blamed():
    class Shifted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(5, 3)
            self.register_buffer("shift", torch.zeros(3))

        def forward(self, x):
            return self.first(x) + self.shift

    class Trained(nnx.Module):
        def __init__(self, *, rngs):
            self.first, self.shift = nnx.Linear(5, 3, rngs=rngs), nnx.Param(jnp.zeros(3))

        def __call__(self, x):
            return (self.first(x) + self.shift) * np.float32(1 / 3) * 3  # a constant in float32, which explains itself

    x = np.random.default_rng(0).standard_normal((7, 5))
    report = parity.check(Shifted(), Trained(rngs=nnx.Rngs(0)), x, steps=2)
    failed = [(check.kind, check.worst) for check in report.checks if not check.passed]
    assert failed == [("parameter gradients", "shift")] * 2
    assert report.divergence is None
    assert parity.check(Shifted(), Trained(rngs=nnx.Rngs(0)), x, steps=2, flax_only=["shift"]).passed
