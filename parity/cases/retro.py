"""RETRO: chunked cross-attention, and the model on random tokens and on real text.

Compiling a case with five attentions takes seconds. More sets of `ca_layers`, fewer chunks and no neighbors are tested
in `tests/jaxmodels/retro/test_model.py`, also in float64.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np
from flax import nnx

import torch_ref.retro
from jaxmodels import retro
from jaxmodels.retro import attention
from jaxmodels.text import CharVocabulary, load_corpus
from parity.cases import Pair, case

# Adding one number to every score of a query changes no softmax, and without positions a key bias does only that.
KEY_BIAS = "*c[ac]*.key.bias"


@case("retro.chunked_cross_attention", "ChunkedCrossAttention, 4 chunks of 7 and 5 more tokens")
def chunked_cross_attention(rng: np.random.Generator) -> Pair:
    args = (15, 3, 4, 7)
    inputs = {"h": rng.standard_normal((2, 33, 15)), "e": rng.standard_normal((2, 4, 3, 11, 15))}
    flax = nnx.eval_shape(lambda: attention.ChunkedCrossAttention(*args, rngs=nnx.Rngs(0)))
    return Pair(torch_ref.retro.ChunkedCrossAttention(*args), flax, inputs, zero_gradients=("key.bias",), steps=0)


@case("retro.language_model", "RetroModel, cross-attention in the second layer, 6 chunks of 7 and 4 more tokens")
def language_model(rng: np.random.Generator) -> Pair:
    return pair_of(rng, 46, 3, layers=2, ca_layers={1}, encoder_ca={0})


@case("retro.real_text", "RetroModel, 521 characters of the Python documentation, neighbors from elsewhere in it")
def real_text(rng: np.random.Generator) -> Pair:
    text = load_corpus("python_docs")[:20_000]
    vocabulary = CharVocabulary.of(text)
    ids = vocabulary.encode(text)
    pair = pair_of(rng, 521, 1, layers=1, ca_layers={0}, encoder_ca=(), n_vocab=len(vocabulary), chunk_len=16)
    starts = rng.integers(600, len(ids) - 32, (1, 32, 2, 1))
    inputs = {"x": ids[None, :521], "ret": ids[starts + np.arange(32)]}
    return dataclasses.replace(pair, inputs=inputs, labels=ids[None, 1:522], steps=0)


def pair_of(
    rng: np.random.Generator,
    sequence: int,
    batch: int,
    *,
    layers: int,
    ca_layers: Collection[int],
    encoder_ca: Collection[int],
    neighbors: int = 3,
    n_vocab: int = 37,
    chunk_len: int = 7,
) -> Pair:
    """A model on random ids [B, S] with random neighbors of 11 tokens; labels are the next ids."""
    d_model, heads, d_k, d_ff = 15, 3, 4, 19

    def build(module: Any, **rngs: nnx.Rngs) -> Any:
        encoder = module.NearestNeighborEncoder(chunk_len, 1, encoder_ca, d_model, heads, d_k, d_ff, **rngs)
        sizes = (n_vocab, d_model, layers, ca_layers, chunk_len, heads, d_k, d_ff)
        return module.RetroModel(*sizes, encoder=encoder, **rngs)

    ids = rng.integers(0, n_vocab, (batch, sequence + 1))
    ret = rng.integers(0, n_vocab, (batch, sequence // chunk_len, neighbors, 11))
    flax = nnx.eval_shape(lambda: build(retro, rngs=nnx.Rngs(0)))
    inputs = {"x": ids[:, :-1], "ret": ret}
    return Pair(build(torch_ref.retro), flax, inputs, labels=ids[:, 1:], zero_gradients=(KEY_BIAS,))
