"""Loading of state dicts with the original GPT-NeoX names."""

import numpy as np
import pytest

from jaxmodels.convert import ConversionError, from_torch, to_torch
from tests.jaxmodels.neox.common import CONFIG, neox

L = CONFIG.n_layers
THETA = 10_000.0 ** (-np.arange(0, 4, 2) / 4)


def flat(state_dict):
    """The same tensors under the keys of the original's nn.Sequential."""
    numbers = {"embedding": 0, "final_norm": L + 1, "readout": L + 2}
    renamed = {}
    for key, tensor in state_dict.items():
        part, rest = key.split(".", 1)
        if part == "layers":
            layer, rest = rest.split(".", 1)
            numbers[part] = int(layer) + 1
        renamed[f"{numbers[part]}.{rest}"] = tensor
    return renamed


def with_buffers(state_dict, layer="layers.0.attention", **others):
    buffers = {
        "rotary_emb.inv_freq": THETA.astype(np.float32),
        "bias": np.tri(9, dtype=bool)[None, None],
        "masked_bias": np.float32(-1e9),
    }
    return state_dict | {f"{layer}.{name}": tensor for name, tensor in (buffers | others).items()}


@pytest.mark.parametrize("stacked", [True, False])
def test_the_flat_sequential_loads(stacked):
    model = neox(stacked)
    original = flat(to_torch(model))
    assert {"0.emb.weight", f"{L}.ffn.dense_h4_h.bias", f"{L + 1}.ln.weight", f"{L + 2}.linear.weight"} <= set(original)
    loaded = to_torch(from_torch(model, original))
    for key, tensor in to_torch(model).items():
        np.testing.assert_array_equal(loaded[key], tensor)


def test_buffers_are_skipped():
    model = neox()
    for state_dict in (
        with_buffers(to_torch(model)),
        with_buffers(flat(to_torch(model)), layer="1.attention"),
        with_buffers(to_torch(model), **{"rotary_emb.inv_freq": THETA.astype(np.float16)}),
    ):
        assert to_torch(from_torch(model, state_dict)).keys() == to_torch(model).keys()


@pytest.mark.parametrize(
    ("buffers", "match"),
    [
        ({"rotary_emb.inv_freq": 500.0 ** (-np.arange(0, 4, 2) / 4)}, r"inv_freq=.*base=10000\.0"),
        ({"rotary_emb.inv_freq": 10_000.0 ** (-np.arange(0, 10, 2) / 10)}, r"inv_freq=.* of shape \[5\] .*\bd=4\b"),
        ({"rotary_emb.inv_freq": THETA.astype(np.complex64)}, r"inv_freq=\[\(1\+0j\), "),
        ({"rotary_emb.inv_freq": np.zeros(100_000)}, r"inv_freq=\[0\.0(, 0\.0){9}\] of shape \[100000\] .{,60}$"),
        ({"masked_bias": np.float32(0)}, "masked_bias .* value 0.0 must be a number of at most -1,000"),
        ({"masked_bias": np.float32("nan")}, "masked_bias .* value nan must be"),
        ({"masked_bias": np.full(1_000, -1e9)}, r"masked_bias with shape \[1000\] must be"),
        ({"bias": np.ones((1, 1, 9, 9), bool)}, r"layers\.0\.attention\.bias\b.*\[1, 1, 9, 9\]"),
        (
            {"rotary_emb.inv_freq": np.broadcast_to(np.uint8(0), 2**24)},
            r"inv_freq=\[0(, 0){9}\] of shape \[16777216\] must be .{1,50}$",
        ),
        (
            {"bias": np.ones((0, 3_000, 3_000), bool)},
            r"attention\.bias with shape \[0, 3000, 3000\] must be .*mask of 1 to",
        ),
        ({"bias": np.ones(30, np.float32)}, r"layers\.0\.attention\.bias\b.*\[30\]"),
    ],
)
def test_a_buffer_that_contradicts_the_configuration_is_refused(buffers, match):
    model = neox()
    with pytest.raises(ValueError, match=match):
        from_torch(model, with_buffers(to_torch(model), **buffers))


@pytest.mark.parametrize(
    "key",
    [
        f"{L + 3}.linear.weight",
        "17.attention.output.bias",
        "0.attention.output.bias",
        "01.attention.output.bias",  # of layer 1, by another name
        f"0{L + 2}.linear.weight",
        "9" * 5_000 + ".attention.output.bias",
    ],
)
def test_a_flat_key_beyond_the_model_is_unexpected(key):
    model = neox()
    with pytest.raises(ConversionError, match=r"unexpected \(\d+\)"):
        from_torch(model, flat(to_torch(model)) | {key: np.zeros(3, np.float32)})


def test_digits_of_other_scripts_are_no_number():
    model = neox()
    with pytest.raises(ConversionError, match=r"unexpected \(\d+\).*"):
        from_torch(model, flat(to_torch(model)) | {"\u0661.attention.output.bias": np.zeros(3, np.float32)})


@pytest.mark.parametrize("name", ["rotary_emb.inv_freq", "bias", "masked_bias"])
@pytest.mark.parametrize("layer", [f"layers.{L}", "layers.00", "layers.\u0661", "x.layers.0", "layers"])
def test_a_buffer_of_a_layer_that_the_model_lacks_is_unexpected_and_not_compared(layer, name):
    model = neox()
    with pytest.raises(ConversionError, match=r"unexpected \(1\)"):
        from_torch(model, to_torch(model) | {f"{layer}.attention.{name}": np.zeros(3, np.float32)})


def test_more_layers_than_the_model_has_are_an_error():
    with pytest.raises(ConversionError, match=r"unexpected \(12\)"):
        from_torch(neox(), flat(to_torch(neox(n_layers=L + 1))))
