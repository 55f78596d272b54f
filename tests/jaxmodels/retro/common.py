"""A small RETRO with random weights, its twin, and neighbors for its chunks."""

import torch
from flax import nnx

import torch_ref.retro
from jaxmodels.retro import NearestNeighborEncoder, RetroModel
from tests.common import V, filled, randomised_torch, token_ids

L, N, M = 4, 2, 6  # chunk_len, neighbors, tokens of one
SIZES = {"d_model": 10, "n_heads": 3, "d_k": 4, "d_ff": 7}


def build(module, ca_layers=(1, 2), encoder_ca=(0,), n_layers=3, **rngs):
    encoder = module.NearestNeighborEncoder(L, 2, encoder_ca, **SIZES, **rngs) if ca_layers else None
    return module.RetroModel(V, n_layers=n_layers, ca_layers=ca_layers, chunk_len=L, encoder=encoder, **SIZES, **rngs)


class Flax:
    """The classes by the names that torch_ref has them."""

    NearestNeighborEncoder, RetroModel = NearestNeighborEncoder, RetroModel


def model(scale: float = 0.3, **others) -> RetroModel:
    return filled(lambda: build(Flax, **others, rngs=nnx.Rngs(0)), scale=scale)


def twin(**others) -> torch.nn.Module:
    torch.manual_seed(0)
    return randomised_torch(build(torch_ref.retro, **others).double(), 0.3)


def neighbors(seed: int, batch: int, chunks: int, n: int = N):
    return token_ids(seed, batch, chunks, n, M)
