"""The PyTorch GPT-NeoX against transformers."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from jaxmodels.neox import NeoXConfig
from parity.cases.neox import Transformers
from torch_ref.neox import NeoX

CONFIG = NeoXConfig(23, 3 * 10, 2, 3, rope_percentage=0.4, n_ff=17)
LINEAR = ("weight", "bias")
IDS = torch.tensor(np.random.default_rng(0).integers(0, 23, (5, 13)))
START = torch.tensor([0, 3, 11, 1, 12])


def model(**fields):
    torch.manual_seed(0)
    module = NeoX(dataclasses.replace(CONFIG, **fields)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("tied", [False, True])
def test_state_dict_has_the_names_of_the_original_layers(tied):
    layer = [
        *(f"pre_ln_{part}.{w}" for part in ("attn", "ffn") for w in LINEAR),
        *(f"attention.{part}.{w}" for part in ("qkv_lin", "output") for w in LINEAR),
        *(f"ffn.{part}.{w}" for part in ("dense_h_h4", "dense_h4_h") for w in LINEAR),
    ]
    expected = {"embedding.emb.weight", *(f"layers.{i}.{key}" for i in range(2) for key in layer)}
    expected |= {f"final_norm.ln.{w}" for w in LINEAR} | (set() if tied else {"readout.linear.weight"})
    assert set(model(tied=tied).state_dict()) == expected


@torch.no_grad()
@pytest.mark.parametrize("start", [None, START], ids=["whole", "padded"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"activation": "gelu_tanh"},
        {"parallel_residual": False},
        {"tied": True, "rope_base": 300.0, "layer_norm_eps": 0.1},
        {"rope_percentage": 1.0, "n_ff": None},
    ],
    ids=str,
)
def test_it_computes_what_transformers_computes(fields, start):
    ours = model(**fields)
    theirs = Transformers(dataclasses.replace(CONFIG, **fields)).double()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(IDS, start), theirs(IDS, start), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_padded_rows_equal_the_rows_alone_and_see_no_padding():
    module = model()
    logits = module(torch.where(torch.arange(13) < START[:, None], 99, IDS), START)
    for row, start in enumerate(START.tolist()):
        torch.testing.assert_close(logits[row, start:], module(IDS[row : row + 1, start:])[0])
        assert not logits[row, :start].any()


@torch.no_grad()
def test_no_token_sees_a_later_one():
    module, later = model(), IDS.clone()
    later[:, 8:] = IDS.flip(0)[:, 8:]
    torch.testing.assert_close(module(later)[:, :8], module(IDS)[:, :8])
    assert (module(later)[:, 8:] != module(IDS)[:, 8:]).any()


def test_float16_survives_scores_beyond_its_range():
    module = model()
    with torch.no_grad():
        for layer in module.layers:
            layer.attention.qkv_lin.weight.mul_(400)
    assert module.half()(IDS).isfinite().all()


def test_initial_weights_are_drawn_as_the_original_draws_them():
    torch.manual_seed(0)
    config = NeoXConfig(211, 96, 3, 6)
    wide, narrow = math.sqrt(2 / (5 * 96)), 2 / (3 * math.sqrt(96))
    for name, parameter in NeoX(config).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif parameter.ndim == 2:
            deviation = narrow if name.endswith(("attention.output.weight", "dense_h4_h.weight")) else wide
            assert abs(parameter.std().item() / deviation - 1) < 5 / math.sqrt(2 * parameter.numel()), name
