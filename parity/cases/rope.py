"""RoPE: the embeddings, the attentions with them, and the language model, on random tokens and on real text."""

import dataclasses
from typing import Any

import numpy as np
from flax import nnx

import torch_ref.rope as torch_rope
import torch_ref.transformer as torch_transformer
from jaxmodels import rope, transformer
from jaxmodels.text import CharVocabulary, load_corpus
from parity.cases import Pair, case, language_model


@case("rope.embeddings", "RotaryPositionalEmbeddings, 6 of 10 features rotated, 577 positions")
def embeddings(rng: np.random.Generator) -> Pair:
    x = rng.standard_normal((577, 3, 5, 10))
    return Pair(torch_rope.RotaryPositionalEmbeddings(6), rope.RotaryPositionalEmbeddings(6), {"x": x})


@case("rope.attention", "RotaryPEMultiHeadAttention, half of d_k rotated, padding mask, more keys than queries")
def attention(rng: np.random.Generator) -> Pair:
    args = (3, 3 * 20, 0.5)
    return attention_pair(rng, torch_rope.RotaryPEMultiHeadAttention(*args), rope.RotaryPEMultiHeadAttention, args)


@case("rope.value_attention", "RotaryValuePEMultiHeadAttention (RoPER), a fifth of the values' features rotated")
def value_attention(rng: np.random.Generator) -> Pair:
    args = (3, 3 * 20, 0.5, 0.2)
    torch_module = torch_rope.RotaryValuePEMultiHeadAttention(*args)
    return attention_pair(rng, torch_module, rope.RotaryValuePEMultiHeadAttention, args)


def attention_pair(
    rng: np.random.Generator, torch_module: Any, flax_class: Any, args: tuple, s: int = 29, n: int = 31
) -> Pair:
    """An attention on s queries and n keys of width args[1], batch 5, with a mask that hides a third of the keys."""
    mask = rng.random((s, n, 5)) < 2 / 3
    mask[:, 0] = True  # every query sees the first key
    inputs = {
        "query": rng.standard_normal((s, 5, args[1])),
        "key": rng.standard_normal((n, 5, args[1])),
        "value": rng.standard_normal((n, 5, args[1])),
        "mask": mask,
    }
    return Pair(torch_module, nnx.eval_shape(lambda: flax_class(*args, rngs=nnx.Rngs(0))), inputs)


@case("rope.language_model", "AutoregressiveTransformer, rotary, 131 tokens")
def rotary_language_model(rng: np.random.Generator) -> Pair:
    return pair_of(rng, 131, 3, 37, 5 * 6, 5, 47, 2, "rotary")


@case("rope.value_language_model", "AutoregressiveTransformer, rotary values (RoPER), 131 tokens")
def rotary_value_language_model(rng: np.random.Generator) -> Pair:
    return pair_of(rng, 131, 3, 37, 5 * 6, 5, 47, 2, "rotary_value")


@case("rope.real_text", "AutoregressiveTransformer, rotary, 521 characters of the Python documentation")
def real_text(rng: np.random.Generator) -> Pair:
    text = load_corpus("python_docs")[: 2 * 522]
    vocabulary = CharVocabulary.of(text)
    ids = vocabulary.encode(text).reshape(2, 522).T
    pair = pair_of(rng, 521, 2, len(vocabulary), 3 * 14, 3, 71, 2, "rotary")
    # Two steps of training instead of ten: at this length each takes PyTorch seconds.
    return dataclasses.replace(pair, inputs={"ids": ids[:-1]}, labels=ids[1:], steps=2)


def pair_of(rng: np.random.Generator, sequence: int, batch: int, *args: Any) -> Pair:
    """AutoregressiveTransformer on random ids."""
    torch_class, flax_class = torch_transformer.AutoregressiveTransformer, transformer.AutoregressiveTransformer
    return language_model(torch_class, flax_class, rng, sequence, batch, *args)
