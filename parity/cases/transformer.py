"""The parts of a transformer, and the language model with plain and with relative attention."""

import dataclasses
from typing import Any

import numpy as np
from flax import nnx

import torch_ref.transformer as torch_transformer
from jaxmodels import transformer
from parity.cases import Pair, case
from parity.cases.rope import attention_pair, pair_of

# Adding one number to every score of a query changes no softmax, and a key bias adds q·b to all of them.
KEY_BIAS = "*key.linear.bias"


@case("transformer.attention", "MultiHeadAttention with biases; the key bias has no gradient")
def attention(rng: np.random.Generator) -> Pair:
    args = (7, 7 * 5, 0.0)
    torch_module = torch_transformer.MultiHeadAttention(*args)
    pair = attention_pair(rng, torch_module, transformer.MultiHeadAttention, args)
    return dataclasses.replace(pair, zero_gradients=(KEY_BIAS,))


@case("transformer.relative_attention", "RelativeMultiHeadAttention, queries at the end of more keys")
def relative_attention(rng: np.random.Generator) -> Pair:
    args = (3, 3 * 7, 0.0)
    torch_module = torch_transformer.RelativeMultiHeadAttention(*args)
    return attention_pair(rng, torch_module, transformer.RelativeMultiHeadAttention, args)


@case("transformer.feed_forward", "FeedForward")
def feed_forward(rng: np.random.Generator) -> Pair:
    x = rng.standard_normal((7, 3, 13))
    flax_module = transformer.FeedForward(13, 29, rngs=nnx.Rngs(0))
    return Pair(torch_transformer.FeedForward(13, 29), flax_module, {"x": x})


@case("transformer.encoder", "Encoder of two layers with different attentions, causal mask")
def encoder(rng: np.random.Generator) -> Pair:
    d_model, d_ff, s = 21, 37, 67

    def build(module: Any, **rngs: nnx.Rngs) -> Any:
        attentions = [
            module.RelativeMultiHeadAttention(3, d_model, 0.0, **rngs),
            module.MultiHeadAttention(7, d_model, 0.0, bias=False, **rngs),
        ]
        layers = [module.TransformerLayer(attention, d_model, d_ff, 0.0, **rngs) for attention in attentions]
        return module.Encoder(layers, d_model, **rngs)

    x, mask = rng.standard_normal((s, 5, d_model)), np.tril(np.ones((s, s), bool))[:, :, None]
    return Pair(build(torch_transformer), build(transformer, rngs=nnx.Rngs(0)), {"x": x, "mask": mask})


@case("transformer.plain_language_model", "AutoregressiveTransformer without positions, 97 tokens")
def plain_language_model(rng: np.random.Generator) -> Pair:
    pair = pair_of(rng, 97, 3, 37, 5 * 6, 5, 47, 2, "plain")
    return dataclasses.replace(pair, zero_gradients=(KEY_BIAS,))


@case("transformer.relative_language_model", "AutoregressiveTransformer, relative positions, 131 tokens")
def relative_language_model(rng: np.random.Generator) -> Pair:
    return pair_of(rng, 131, 3, 37, 5 * 4, 5, 47, 2, "relative")
