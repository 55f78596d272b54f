"""GPT-NeoX against its reference, and against transformers' own implementation."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from torch import nn

import torch_ref.neox
from jaxmodels.convert import from_torch, to_torch
from jaxmodels.convert.hf import load_hf, save_hf
from jaxmodels.convert.neox import load_neox, save_neox
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.text import CharVocabulary, load_corpus
from jaxmodels.weights.names import as_numpy
from parity.cases import Pair, case
from parity.checkpoint.gpt_neox import Transformers
from parity.compare.randomize import randomized


@case("neox.language_model", "NeoX, parallel residual, exact GELU, a quarter of d_k rotated, 97 tokens")
def parallel(rng: np.random.Generator) -> Pair:
    config = NeoXConfig(37, 5 * 8, 2, 5, n_ff=61)
    return pair_of(rng, config, torch_ref.neox.NeoX(config), 97, 3)


@case("neox.sequential", "NeoX, sequential residual, tanh GELU, tied readout, other ε and base")
def sequential(rng: np.random.Generator) -> Pair:
    config = NeoXConfig(
        37,
        3 * 10,
        2,
        3,
        rope_percentage=0.6,
        rope_base=500.0,
        activation="gelu_tanh",
        parallel_residual=False,
        layer_norm_eps=1e-2,
        tied=True,
    )
    return pair_of(rng, config, torch_ref.neox.NeoX(config), 73, 3)


@case("neox.variant", "NeoX, RMSNorm, 2 heads of keys and values for 6 of queries, no biases in attention")
def variant(rng: np.random.Generator) -> Pair:
    config = NeoXConfig(
        37, 6 * 10, 2, 6, rope_percentage=0.4, n_ff=61, norm="rmsnorm", n_kv_heads=2, attention_bias=False
    )
    return pair_of(rng, config, torch_ref.neox.NeoX(config), 31, 3, steps=0)


@case("neox.transformers", "GPTNeoXForCausalLM, 521 characters of the Python documentation; also in 16 bits")
def real_text(rng: np.random.Generator) -> Pair:
    text = load_corpus("python_docs")[:522]
    vocabulary = CharVocabulary.of(text)
    config = NeoXConfig(len(vocabulary), 3 * 16, 2, 3)
    ids = vocabulary.encode(text)[None]
    # Two steps of training instead of ten: at this length each takes PyTorch seconds.
    inputs, half = {"ids": ids[:, :-1]}, ("bfloat16", "float16")
    return Pair(Transformers(config), abstract(config), inputs, labels=ids[:, 1:], half=half, steps=2)


@case("neox.transformers_ragged", "GPTNeoXForCausalLM, left padding of 17, 0 and 41 of 73 tokens")
def ragged(rng: np.random.Generator) -> Pair:
    config = NeoXConfig(37, 5 * 8, 2, 5, activation="gelu_tanh")
    return pair_of(rng, config, Transformers(config), 73, 3, start=np.array([17, 0, 41]))


@case("neox.shards", "NeoX after writing and reading GPT-NeoX shards of 1, 2 and 4 ranks, bit for bit")
def shards(rng: np.random.Generator) -> Pair:
    config, module = CONVERTED, randomized(torch_ref.neox.NeoX(CONVERTED), 0)
    model = from_torch(abstract(config), module.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2, 4):
            save_neox(model, Path(folder) / str(ranks), ranks)
            model = load_neox(Path(folder) / str(ranks))  # each from the one before
            same_bits(f"{ranks} model-parallel ranks", to_torch(model), module)
    return pair_of(rng, config, module, 17, 3, flax=model, steps=0)


@case("neox.hf_files", "GPTNeoXForCausalLM and load_hf on a folder written by save_hf")
def hf_files(rng: np.random.Generator) -> Pair:
    config, module = CONVERTED, randomized(torch_ref.neox.NeoX(CONVERTED), 0)
    with tempfile.TemporaryDirectory() as folder:
        save_hf(from_torch(abstract(config), module.state_dict()), folder)
        model, theirs = load_hf(folder), Transformers(config, folder)
    same_bits("load_hf", to_torch(model), module)
    same_bits("transformers", theirs.state_dict(), module)
    return pair_of(rng, config, theirs, 17, 3, flax=model, steps=0)


# 4 heads, for 4 ranks; no default values, because the files have to preserve them.
CONVERTED = NeoXConfig(37, 4 * 10, 2, 4, n_ff=68, rope_percentage=0.6, rope_base=500.0, layer_norm_eps=1e-3)


def same_bits(what: str, given: Any, module: nn.Module) -> None:
    """Raise ValueError that names the tensors of `given` that differ from the module's."""
    expected = {name: as_numpy(tensor) for name, tensor in module.state_dict().items()}
    wrong = sorted(expected.keys() ^ given.keys())
    wrong += [
        name
        for name in expected.keys() & given.keys()
        if as_numpy(given[name]).dtype != expected[name].dtype
        or as_numpy(given[name]).tobytes() != expected[name].tobytes()
    ]
    if wrong:
        raise ValueError(f"{what}: {len(wrong)} of {len(expected)} tensors differ: {', '.join(wrong)}")


def pair_of(
    rng: np.random.Generator,
    config: NeoXConfig,
    torch_module: nn.Module,
    sequence: int,
    batch: int,
    start: np.ndarray | None = None,
    flax: NeoX | None = None,
    steps: int = 10,
) -> Pair:
    """A pair on random ids [B, S]; labels are the next ids."""
    ids = rng.integers(0, config.n_vocab, (batch, sequence + 1))
    inputs = {"ids": ids[:, :-1]} | ({} if start is None else {"start": start})
    return Pair(torch_module, abstract(config) if flax is None else flax, inputs, labels=ids[:, 1:], steps=steps)


def abstract(config: NeoXConfig) -> NeoX:
    """The model with shapes only."""
    return nnx.eval_shape(lambda: NeoX(config, rngs=nnx.Rngs(0)))
