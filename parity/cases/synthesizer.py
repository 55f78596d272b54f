"""The Synthesizer family: the original single-head layer, every kind with several heads, and language models."""

import dataclasses
from functools import partial

import numpy as np
from flax import nnx

import torch_ref.synthesizer as torch_synthesizer
import torch_ref.transformer as torch_transformer
from jaxmodels import synthesizer, transformer
from parity.cases import Pair, case, language_model
from parity.cases.transformer import KEY_BIAS

HEADS, D_MODEL, MAX_LEN = 3, 3 * 7, 31
KINDS = [
    "dense",
    "random",
    "fixed_random",
    "factorized_dense",
    "factorized_random",
    "random+dense",
    "random+vanilla",
    "dense+factorized_random+vanilla",
]


@case("synthesizer.dense_layer", "DenseSynthesizer, 23 tokens of at most 31")
def dense_layer(rng: np.random.Generator) -> Pair:
    x, v = rng.standard_normal((2, 5, 23, D_MODEL))
    flax_module = synthesizer.DenseSynthesizer(MAX_LEN, D_MODEL, rngs=nnx.Rngs(0))
    return Pair(torch_synthesizer.DenseSynthesizer(MAX_LEN, D_MODEL), flax_module, {"x": x, "v": v})


def attention(kind: str, rng: np.random.Generator) -> Pair:
    """SynthesizerAttention of a kind on 19 queries and 23 keys, a third of which is hidden."""
    args = (kind, HEADS, D_MODEL, MAX_LEN)
    mask = rng.random((19, 23, 5)) < 2 / 3
    mask[:, 0] = True
    inputs = {name: rng.standard_normal((n, 5, D_MODEL)) for name, n in (("query", 19), ("key", 23), ("value", 23))}
    if "vanilla" not in kind:
        inputs["key"] = inputs["value"]  # this kind ignores keys, but the call takes them
    flax_module = nnx.eval_shape(lambda: synthesizer.SynthesizerAttention(*args, rngs=nnx.Rngs(0)))
    zero = (KEY_BIAS,) if "vanilla" in kind else ()
    return Pair(
        torch_synthesizer.SynthesizerAttention(*args), flax_module, inputs | {"mask": mask}, zero_gradients=zero
    )


for _kind in KINDS:
    case(f"synthesizer.{_kind}", f"SynthesizerAttention, kind {_kind}")(partial(attention, _kind))


def synthesizer_language_model(kind: str, rng: np.random.Generator) -> Pair:
    """AutoregressiveTransformer with a synthesizer of at most 101 tokens, on 97 of them."""
    torch_class, flax_class = torch_transformer.AutoregressiveTransformer, transformer.AutoregressiveTransformer
    args = (37, D_MODEL, HEADS, 47, 2, kind)
    pair = language_model(torch_class, flax_class, rng, 97, 2, *args, max_len=101)
    return dataclasses.replace(pair, zero_gradients=(KEY_BIAS,) if "vanilla" in kind else ())


for _kind in ("dense", "factorized_dense", "random+vanilla"):
    case(f"synthesizer.{_kind}_language_model", f"AutoregressiveTransformer, {_kind} synthesizer, 97 of 101 tokens")(
        partial(synthesizer_language_model, _kind)
    )
