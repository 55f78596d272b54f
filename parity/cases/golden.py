"""Models of the fixtures in the package: every language model of the project, smaller than in its cases.

Only language models can be rebuilt from a configuration, without torch. Relative attention is left out: its tables have
8192 rows. A new model needs one entry in GOLDEN; `python -m parity --record parity/golden/fixtures NAME` writes its
files.
"""

import dataclasses
from functools import partial
from typing import Any

import numpy as np

import torch_ref.neox
import torch_ref.transformer
from jaxmodels import transformer
from jaxmodels.neox import NeoXConfig
from parity.cases import Make, Pair, feedback, language_model, neox, retro
from parity.cases.transformer import KEY_BIAS

TOKENS, BATCH, N_VOCAB = 23, 3, 13
SIZES = (N_VOCAB, 3 * 4, 3, 17, 2)  # n_vocab, d_model, heads, d_ff, n_layers


def attention(kind: str, rng: np.random.Generator, **others: Any) -> Pair:
    """AutoregressiveTransformer with a kind of attention."""
    classes = torch_ref.transformer.AutoregressiveTransformer, transformer.AutoregressiveTransformer
    pair = language_model(*classes, rng, TOKENS, BATCH, *SIZES, kind, **others)
    keyed = kind == "plain" or "vanilla" in kind  # with a key bias and without rotation
    return dataclasses.replace(pair, zero_gradients=(KEY_BIAS,) if keyed else ())


def feedback_model(variant: str, rng: np.random.Generator) -> Pair:
    """One narrow layer: its position tables have 4096 rows."""
    return feedback.language_model(rng, variant, TOKENS, BATCH, N_VOCAB, 3 * 2, 3, 17, 1)


def neox_model(rng: np.random.Generator, **others: Any) -> Pair:
    """Two layers of three heads."""
    config = NeoXConfig(N_VOCAB, 3 * 8, 2, 3, n_ff=29, **others)
    return neox.pair_of(rng, config, torch_ref.neox.NeoX(config), TOKENS, BATCH)


def retro_model(rng: np.random.Generator) -> Pair:
    """Four chunks and one token: a prefill of one chunk, then neighbors after the last token of each chunk."""
    return retro.pair_of(rng, 29, BATCH, layers=2, ca_layers={1}, encoder_ca={0}, neighbors=2, n_vocab=N_VOCAB)


GOLDEN: dict[str, Make] = {
    "rope.rotary": partial(attention, "rotary"),
    "rope.rotary_value": partial(attention, "rotary_value"),
    "transformer.plain": partial(attention, "plain"),
    "synthesizer.dense": partial(attention, "dense", max_len=29),
    "synthesizer.random+vanilla": partial(attention, "random+vanilla", max_len=29),
    "synthesizer.factorized_dense": partial(attention, "factorized_dense", max_len=31),
    "feedback.own": partial(feedback_model, "FeedbackTransformer"),
    "feedback.shared": partial(feedback_model, "FeedbackTransformerKV"),
    "retro.neighbors": retro_model,
    "neox.parallel": neox_model,
    "neox.variant": partial(neox_model, norm="rmsnorm", n_kv_heads=1, attention_bias=False, ffn_bias=False),
    "neox.sequential": partial(neox_model, parallel_residual=False, activation="gelu_tanh", tied=True),
}
