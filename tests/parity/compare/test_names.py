"""Pairs with different names of parts: names in all forms, and the rules of layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx

import parity
from jaxmodels.convert import ConversionError
from parity.compare.names import renamer
from parity.compare.weights import Mapped


class TorchVision(torch.nn.Module):
    """Convolution, BatchNorm and a transposed convolution, channels second."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 6, (3, 2), groups=2)
        self.bn = torch.nn.BatchNorm2d(6)
        self.up = torch.nn.ConvTranspose2d(6, 5, (2, 3))

    def forward(self, x):
        return self.up(torch.relu(self.bn(self.conv(x))))


class FlaxVision(nnx.Module):
    def __init__(self, *, rngs, momentum=0.9):
        self.first = nnx.Conv(4, 6, (3, 2), padding="VALID", feature_group_count=2, rngs=rngs)
        self.norm = nnx.BatchNorm(6, epsilon=1e-5, momentum=momentum, use_fast_variance=False, rngs=rngs)
        self.second = nnx.ConvTranspose(6, 5, (2, 3), padding="VALID", rngs=rngs)

    def __call__(self, x):
        return self.second(jax.nn.relu(self.norm(self.first(x))))


class LinenVision(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(6, (3, 2), padding="VALID", feature_group_count=2)(x)
        x = linen.BatchNorm(use_running_average=True, epsilon=1e-5)(x)
        return linen.ConvTranspose(5, (2, 3), padding="VALID")(jax.nn.relu(x))


NNX_NAMES = {"conv": "first", "bn": "norm", "up": "second"}
LINEN_NAMES = {"conv": "Conv_0", "bn": "BatchNorm_0", "up": "ConvTranspose_0"}
IMAGES = {"input": np.random.default_rng(0).standard_normal((2, 4, 7, 11))}
LAST = ("input 0", "output")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flax_module", "names"),
    [(FlaxVision(rngs=nnx.Rngs(0)), NNX_NAMES), (LinenVision(), LINEN_NAMES)],
    ids=["nnx", "linen"],
)
def test_convolutions_and_batch_norm_agree_and_are_suggested(flax_module, names):
    torch.manual_seed(0)
    images = IMAGES["input"]
    report = parity.check(TorchVision(), flax_module, images, names=names, channels_last=LAST, steps=1)
    assert report.passed, str(report)
    suggestion = parity.suggest(TorchVision(), flax_module, images, LAST)
    assert suggestion.names == names
    assert suggestion.complete


class WrongEpsilon(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(6, (3, 2), padding="VALID", feature_group_count=2)(x)
        x = linen.BatchNorm(use_running_average=True, epsilon=1e-3)(x)
        return linen.ConvTranspose(5, (2, 3), padding="VALID")(jax.nn.relu(x))


@pytest.mark.slow
def test_the_culprit_in_a_linen_module_is_named_with_its_epsilon():
    torch.manual_seed(0)
    report = parity.check(
        TorchVision(), WrongEpsilon(), IMAGES["input"], names=LINEN_NAMES, channels_last=LAST, steps=0
    )
    assert report.divergence.path == "bn", str(report)
    assert report.divergence.hint == "epsilon: Flax has 0.001, PyTorch 1e-05"
    verdicts = {part.path: part.verdict for part in report.divergence.forward.walk()}
    assert verdicts == {"": "encloses", "conv": "agrees", "bn": "culprit", "up": "victim"}


class TorchFused(torch.nn.Module):
    """A fused projection, two layers, and a read-out tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.wte = torch.nn.Embedding(11, 6)
        self.h = torch.nn.ModuleList(torch.nn.ModuleDict({"qkv": torch.nn.Linear(6, 18)}) for _ in range(2))
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids):
        x = self.wte(ids)
        for layer in self.h:
            q, k, v = layer["qkv"](x).split(6, dim=-1)
            x = x + torch.tanh(q) * k + v
        return self.head(x)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.query, self.key, self.value = (nnx.LinearGeneral(6, (2, 3), rngs=rngs) for _ in range(3))

    def __call__(self, x):
        q, k, v = (part(x).reshape(x.shape) for part in (self.query, self.key, self.value))
        return x + jnp.tanh(q) * k + v


class FlaxSplit(nnx.Module):
    """Its layers are stacked, its projections have heads, its table is also the read-out."""

    def __init__(self, *, rngs):
        self.table = nnx.Param(jnp.zeros((11, 6)))
        self.layers = nnx.vmap(lambda key: Layer(nnx.Rngs(key)))(jax.random.split(rngs.params(), 2))

    def __call__(self, ids):
        x, _ = jax.lax.scan(lambda x, layer: (layer(x), None), self.table[...][ids], self.layers)
        return x @ self.table[...].T


PARTS = [f"layers.*.{name}" for name in ("query", "key", "value")]


def of_function(name: str):
    words = name.split(".")
    if words[0] == "wte":
        return "table"
    return [f"layers.{words[1]}.{part}.{words[-1]}" for part in ("query", "key", "value")] if words[0] == "h" else None


FORMS = {
    "mapping": {"wte.weight": "table", "h.*.qkv": PARTS, "head": None},
    "function": of_function,
}


@pytest.mark.slow
@pytest.mark.parametrize("names", FORMS.values(), ids=FORMS)
def test_fused_stacked_and_tied_weights_are_converted_and_back(names):
    torch.manual_seed(0)
    ids = np.random.default_rng(0).integers(0, 11, (3, 7))
    report = parity.check(TorchFused(), FlaxSplit(rngs=nnx.Rngs(0)), ids, names=names, labels=ids, steps=1)
    assert report.passed, str(report)


def test_pairs_of_regular_expressions():
    rename = renamer([(r"^h\.(\d+)", r"blocks.\1"), (r"ln_(\d)", r"norm\1")])
    assert rename("h.3.ln_1.weight") == ["blocks.3.norm1.weight"]


def test_a_star_is_a_word_and_the_longest_name_applies():
    rename = renamer({"": "model", "h.*": "blocks.*", "h.*.attn": "blocks.*.attention", "h.*.mask": None})
    assert rename("h.3.attn.weight") == ["blocks.3.attention.weight"]
    assert rename("h.3.mlp") == ["blocks.3.mlp"]
    assert rename("h.3.mask") is None
    assert rename("wte") == ["model.wte"]


def test_everything_that_does_not_fit_is_listed_at_once():
    with pytest.raises(ConversionError) as error:
        Mapped(TorchVision(), FlaxVision(rngs=nnx.Rngs(0)), {"conv": "second", "bn": "norm"})
    assert set(error.value.problems) == {"missing", "unexpected", "misshapen"}
    assert "up.weight" in str(error.value)


@pytest.mark.parametrize("names", ["conv", 3, [("a", "b", "c")]])
def test_names_of_another_form_are_an_error(names):
    with pytest.raises(ValueError, match=r"names="):
        renamer(names)


def test_a_star_too_many_is_an_error():
    with pytest.raises(ValueError, match=r"names\['h.3'\]='blocks\.\*'"):
        renamer({"h.3": "blocks.*"})
