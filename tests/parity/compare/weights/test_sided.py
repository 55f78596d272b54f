"""One-sided contents: arrays with their own values, parameters of one side, statistics, tables; wrapped weights."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx

import parity
from jaxmodels.convert import ConversionError
from parity.compare.comparison import Comparison
from tests.parity.compare.weights.pairs import EXACT, distance, weights

ROWS, SEQUENCES = (np.random.default_rng(0).standard_normal(shape) for shape in ((4, 6), (2, 4, 9)))


class Scaled(torch.nn.Module):
    """A linear layer and a factor: a number, a parameter or a buffer."""

    def __init__(self, factor=2.0, kind=None):
        super().__init__()
        self.up = torch.nn.Linear(6, 5)
        value = torch.full((5,), factor)
        self.scale = torch.nn.Parameter(value) if kind == "parameter" else factor
        if kind == "buffer":
            del self.scale
            self.register_buffer("scale", value)

    def forward(self, x):
        return self.up(x) * self.scale


class FlaxScaled(nnx.Module):
    def __init__(self, kind=None):
        self.up = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
        self.scale = 2.0 if kind is None else kind(jnp.full(5, 2.0))

    def __call__(self, x):
        return self.up(x) * (self.scale if isinstance(self.scale, float) else self.scale[...])


class LinenScaled(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(5, name="up")(x) * self.param("scale", lambda key: jnp.full(5, 2.0))


def test_an_array_without_a_counterpart_keeps_its_values():
    with pytest.raises(ConversionError, match=r"scale: Flax has \[5\]"):
        weights(Scaled(), FlaxScaled(nnx.Param), ROWS)
    assert distance(Scaled(), FlaxScaled(nnx.Param), ROWS, flax_only=["scale"]) < EXACT
    assert distance(Scaled(3.0), FlaxScaled(nnx.Param), ROWS, flax_only=["scale"]) > 0.1


def test_an_array_of_a_linen_module_keeps_its_values_if_it_has_any():
    with pytest.raises(ValueError, match="flax_only: scale"):
        weights(Scaled(), LinenScaled(), ROWS, flax_only=["scale"])
    module = LinenScaled()
    bound = module.bind(module.init(nnx.Rngs(0).params(), jnp.ones((4, 6))))
    assert distance(Scaled(), bound, ROWS, flax_only=["scale"]) < EXACT


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_a_tensor_without_a_counterpart_keeps_its_values(kind):
    with pytest.raises(ConversionError, match=r"scale: PyTorch has \[5\]"):
        weights(Scaled(kind=kind), FlaxScaled(), ROWS)
    assert distance(Scaled(kind=kind), FlaxScaled(), ROWS, torch_only=["scale"]) < EXACT
    assert distance(Scaled(3.0, kind), FlaxScaled(), ROWS, torch_only=["scale"]) > 0.1


@pytest.mark.parametrize("argument", ["flax_only", "torch_only"])
def test_patterns_that_match_nothing_are_refused(argument):
    with pytest.raises(ValueError, match=f"{argument}.*'scael'.*up."):
        weights(Scaled(kind="buffer"), FlaxScaled(nnx.Param), ROWS, **{argument: ["scael"]})
    with pytest.raises(ValueError, match=f"{argument}='scale'"):
        weights(Scaled(kind="buffer"), FlaxScaled(nnx.Param), ROWS, **{argument: "scale"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "flax", "argument"), [("buffer", nnx.Param, "flax_only"), ("parameter", nnx.BatchStat, "torch_only")]
)
def test_a_parameter_of_one_side_is_a_difference_unless_it_is_declared(kind, flax, argument):
    pair = Scaled(kind=kind), FlaxScaled(flax), ROWS
    assert distance(*pair) < EXACT
    report = parity.check(*pair, steps=2)
    assert {check.kind for check in report.checks if not check.passed} >= {"parameter gradients"}
    report = parity.check(*pair, steps=2, **{argument: ["scale"]})
    assert report.passed, str(report)
    for settings in ({}, {argument: ["scale"]}):
        assert any("buffer" in note or "fixed" in note for note in weights(*pair, **settings).notes)


class Normalized(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(6, 5)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("std", torch.ones(6))
        self.register_buffer("ids", torch.arange(6))
        self.register_buffer("mask", torch.tensor(-1e9))
        self.register_buffer("angles", torch.arange(6) / 7, persistent=False)

    def forward(self, x):
        return self.up((x - self.mean) / self.std)


class FlaxNormalized(nnx.Module):
    def __init__(self, right=True):
        self.up, self.right = nnx.Linear(6, 5, rngs=nnx.Rngs(0)), right
        self.mean, self.std = nnx.Variable(jnp.zeros(6)), nnx.Variable(jnp.ones(6))

    def __call__(self, x):
        return self.up((x - self.mean) / self.std if self.right else (x + self.mean) * self.std)


def test_constant_buffers_are_perturbed_if_they_are_carried():
    assert distance(Normalized(), FlaxNormalized(), ROWS) < EXACT
    assert distance(Normalized(), FlaxNormalized(right=False), ROWS) > 0.1
    module = Comparison.of(Normalized(), FlaxNormalized(), ROWS).torch
    assert (module.std > 0).all()
    assert module.std.unique().numel() == module.mean.unique().numel() == 6
    assert module.mask == -1e9


def test_tables_and_masks_need_no_counterpart_and_weights_do():
    notes = weights(Normalized(), FlaxNormalized(), ROWS).notes
    assert any("ids, mask" in note for note in notes)
    with pytest.raises(ConversionError) as error:
        weights(Normalized(), FlaxScaled(), ROWS)
    assert [line.partition(":")[0] for line in error.value.problems["unexpected"]] == ["mean", "std"]


class Counting(nnx.Module):
    def __init__(self, table):
        self.up = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
        self.calls, self.table = nnx.Variable(jnp.zeros((), jnp.int32)), nnx.Variable(table)

    def __call__(self, x):
        return self.up(x) * self.table[...]


def test_tables_and_counters_of_flax_need_no_counterpart_and_initial_constants_do():
    table = jnp.arange(1.0, 6.0)
    notes = weights(Scaled(), Counting(table), ROWS).notes
    assert any("calls, table" in note for note in notes)
    with pytest.raises(ConversionError, match="table") as error:
        weights(Scaled(), Counting(jnp.ones(5)), ROWS)
    assert len(error.value.problems["missing"]) == 1


class Unaveraged(torch.nn.Module):
    def __init__(self, affine):
        super().__init__()
        self.bn = torch.nn.BatchNorm1d(6, track_running_stats=False, affine=affine)

    def forward(self, x):
        return self.bn(x)


class LinenUnaveraged(linen.Module):
    averaged: bool
    affine: bool

    @linen.compact
    def __call__(self, x):
        settings = {"epsilon": 1e-5, "use_fast_variance": False, "use_bias": self.affine, "use_scale": self.affine}
        return linen.BatchNorm(use_running_average=self.averaged, **settings, name="bn")(x)


@pytest.mark.parametrize("affine", [False, True])
def test_a_batch_norm_without_running_statistics(affine):
    assert distance(Unaveraged(affine), LinenUnaveraged(False, affine), ROWS) < EXACT
    assert distance(Unaveraged(affine), LinenUnaveraged(True, affine), ROWS) > 0.1


def test_an_nnx_batch_norm_keeps_its_mode():
    class Flax(nnx.Module):
        def __init__(self):
            self.bn = nnx.BatchNorm(6, rngs=nnx.Rngs(0))

    flax_module = Flax()
    found = weights(Unaveraged(True), flax_module, ROWS)
    loaded = found.load(flax_module, Unaveraged(True).state_dict())
    assert loaded.bn.use_running_average is False
    assert any("bn" in note for note in found.notes)
    statistics = torch.nn.Module()
    statistics.bn = torch.nn.BatchNorm1d(6)
    assert weights(statistics, flax_module, ROWS).load(flax_module, statistics.state_dict()).bn.use_running_average


class Convolution(torch.nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.c = wrap(torch.nn.Conv1d(4, 5, 3, padding=1))

    def forward(self, x):
        return self.c(x)


class LinenNormed(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.WeightNorm(linen.Conv(5, (3,), padding=1, name="c"), variable_filter={"kernel"}, name="norm")(x)


class NnxNormed(nnx.Module):
    def __init__(self):
        conv = nnx.Conv(4, 5, (3,), padding=1, rngs=nnx.Rngs(0))
        self.c = nnx.WeightNorm(conv, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.c(x)


@pytest.mark.parametrize(
    ("wrap", "gain"),
    [
        (torch.nn.utils.parametrizations.weight_norm, "c.parametrizations.weight.original0"),
        (torch.nn.utils.weight_norm, "c.weight_g"),
    ],
    ids=["parametrization", "older"],
)
def test_weight_norm(wrap, gain, recwarn):
    settings = {"channels_last": ("input 0", "output")}
    names = {gain: "norm.c/kernel/scale"}
    assert distance(Convolution(wrap), LinenNormed(), SEQUENCES, names=names, **settings) < EXACT
    names = {"c": "c.layer_instance", gain: "c.scales.('kernel',)"}
    assert distance(Convolution(wrap), NnxNormed(), SEQUENCES, names=names, **settings) < EXACT


class Spectral(torch.nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.up = wrap(torch.nn.Linear(6, 5))

    def forward(self, x):
        return self.up(x)


class FlaxSpectral(nnx.Module):
    """The names that the older `spectral_norm` gives."""

    def __init__(self):
        self.up = nnx.Dict(
            weight_orig=nnx.Param(jnp.ones((5, 6))),
            bias=nnx.Param(jnp.ones(5)),
            weight_u=nnx.BatchStat(jnp.ones(5)),
            weight_v=nnx.BatchStat(jnp.ones(6)),
        )

    def __call__(self, x):
        w = self.up["weight_orig"][...]
        return x @ (w / (self.up["weight_u"][...] @ w @ self.up["weight_v"][...])).T + self.up["bias"]


@pytest.mark.parametrize("wrap", [torch.nn.utils.parametrizations.spectral_norm, torch.nn.utils.spectral_norm])
def test_spectral_norm(wrap, recwarn):
    assert distance(Spectral(wrap), FlaxSpectral(), ROWS) < EXACT
