"""The Feedback Transformer: its attention and layer, both variants as language models, and the original's stack."""

import dataclasses
from typing import Any

import numpy as np
from flax import nnx

import torch_ref.feedback as torch_feedback
import torch_ref.feedback_stack as torch_stack
from jaxmodels import feedback
from jaxmodels.text import CharVocabulary, load_corpus
from parity.cases import Pair, case

STEPS = 4  # of training instead of ten: PyTorch's loop over the tokens takes most of the time


@case("feedback.attention", "FeedbackAttention with its own key and value projections, 31 memories")
def attention(rng: np.random.Generator) -> Pair:
    args = (3, 3 * 7, 0.0)
    memory = rng.standard_normal((31, 5, 21))
    inputs = {"query": rng.standard_normal((5, 21)), "key": memory, "value": memory}
    flax = nnx.eval_shape(lambda: feedback.FeedbackAttention(*args, rngs=nnx.Rngs(0)))
    return Pair(torch_feedback.FeedbackAttention(*args), flax, inputs)


@case("feedback.layer", "FeedbackTransformerLayer with 29 precomputed keys and values")
def layer(rng: np.random.Generator) -> Pair:
    def build(module: Any, **rngs: nnx.Rngs) -> Any:
        attention = module.FeedbackAttention(5, 5 * 6, 0.0, is_kv_precomputed=True, **rngs)
        return module.FeedbackTransformerLayer(attention, 5 * 6, 47, 0.0, **rngs)

    key, value = rng.standard_normal((2, 29, 3, 5, 6))
    inputs = {"x": rng.standard_normal((3, 5 * 6)), "key": key, "value": value}
    return Pair(build(torch_feedback), nnx.eval_shape(lambda: build(feedback, rngs=nnx.Rngs(0))), inputs)


def language_model(
    rng: np.random.Generator, variant: str, sequence: int, batch: int, n_vocab: int, *args: Any, **limits: Any
) -> Pair:
    """A variant as language model on random ids [S, B]; labels are the next ids."""

    def build(module: Any, **rngs: nnx.Rngs) -> Any:
        transformer = getattr(module, variant)(*args, **limits, **rngs)
        return module.AutoregressiveModel(n_vocab, transformer, **rngs)

    ids = rng.integers(0, n_vocab, (sequence + 1, batch))
    flax = nnx.eval_shape(lambda: build(feedback, rngs=nnx.Rngs(0)))
    return Pair(build(torch_feedback), flax, {"ids": ids[:-1]}, labels=ids[1:], steps=STEPS)


@case("feedback.language_model", "FeedbackTransformer (keys and values per layer), 41 tokens")
def own(rng: np.random.Generator) -> Pair:
    return language_model(rng, "FeedbackTransformer", 41, 3, 37, 5 * 4, 5, 31, 2)


@case("feedback.kv_language_model", "FeedbackTransformerKV (shared keys and values), 41 tokens")
def shared(rng: np.random.Generator) -> Pair:
    return language_model(rng, "FeedbackTransformerKV", 41, 3, 37, 5 * 4, 5, 31, 2)


@case("feedback.limited_language_model", "FeedbackTransformerKV with a memory of 13 steps, 41 tokens")
def limited(rng: np.random.Generator) -> Pair:
    return language_model(rng, "FeedbackTransformerKV", 41, 3, 37, 5 * 4, 5, 31, 1, memory=13)


@case("feedback.stack", "FeedbackTransformerKV against the original's stack with its shared gradient buffer, 41 steps")
def stack(rng: np.random.Generator) -> Pair:
    args = (5 * 4, 5, 31, 1)
    flax = nnx.eval_shape(lambda: feedback.FeedbackTransformerKV(*args, rngs=nnx.Rngs(0)))
    inputs = {"x_seq": rng.standard_normal((41, 3, 5 * 4))}
    return Pair(torch_stack.FeedbackTransformerKV(*args), flax, inputs, steps=STEPS)


@case("feedback.real_text", "FeedbackTransformerKV, 521 characters of the Python documentation")
def real_text(rng: np.random.Generator) -> Pair:
    text = load_corpus("python_docs")[: 2 * 522]
    vocabulary = CharVocabulary.of(text)
    ids = vocabulary.encode(text).reshape(2, 522).T
    pair = language_model(rng, "FeedbackTransformerKV", 521, 2, len(vocabulary), 3 * 6, 3, 29, 1)
    # One step of training: at this length it takes PyTorch seconds.
    return dataclasses.replace(pair, inputs={"ids": ids[:-1]}, labels=ids[1:], steps=1)
