"""GPT-NeoX against its reference, and against transformers' own implementation."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from parity.compare.randomize import randomized
from torch_ref.rope import rotary_tables


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


class Transformers(nn.Module):
    """transformers' GPTNeoXForCausalLM, with parts and arguments named as in the twins.

    Its weights are random; with a folder, weights and configuration are read from there. Raises RuntimeError if
    transformers is not installed.
    """

    def __init__(self, config: NeoXConfig, folder: str | None = None):
        super().__init__()
        model = gpt_neox(config, folder)
        self.model: Any
        self.__dict__["model"] = model  # not as a sub-module: every parameter would have two names
        part = nn.ModuleDict
        self.embedding = part({"emb": model.gpt_neox.embed_in})
        self.layers = nn.ModuleList(
            part(
                {
                    "pre_ln_attn": layer.input_layernorm,
                    "pre_ln_ffn": layer.post_attention_layernorm,
                    "attention": part({"qkv_lin": layer.attention.query_key_value, "output": layer.attention.dense}),
                    "ffn": part({"dense_h_h4": layer.mlp.dense_h_to_4h, "dense_h4_h": layer.mlp.dense_4h_to_h}),
                }
            )
            for layer in model.gpt_neox.layers
        )
        self.final_norm = part({"ln": model.gpt_neox.final_layer_norm})
        if not config.tied:
            self.readout = part({"linear": model.lm_head})

    def forward(self, ids: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
        if start is None:
            return self.model(ids, use_cache=False).logits
        text = torch.arange(ids.shape[1]) >= start[:, None]
        positions = (text.cumsum(dim=1) - 1).clamp(min=0)
        logits = self.model(ids, attention_mask=text.long(), position_ids=positions, use_cache=False).logits
        return logits.masked_fill(~text[:, :, None], 0)


def gpt_neox(config: NeoXConfig, folder: str | None = None) -> Any:
    """GPTNeoXForCausalLM of a configuration, or of a folder; in a float64 model its rotary tables are float64 too."""
    try:
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
        from transformers.utils import logging
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{error}; neox.transformers needs it: pip install transformers") from None

    sdpa: dict[str, Any] = {"attn_implementation": "sdpa"}  # eager attention has its softmax in float32
    theirs = GPTNeoXConfig(
        vocab_size=config.n_vocab,
        hidden_size=config.n_hidden,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        intermediate_size=config.d_ff,
        hidden_act={"gelu": "gelu", "gelu_tanh": "gelu_fast"}[config.activation],
        max_position_embeddings=config.max_len,
        layer_norm_eps=config.layer_norm_eps,
        tie_word_embeddings=config.tied,
        use_parallel_residual=config.parallel_residual,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": config.rope_base,
            "partial_rotary_factor": config.rope_percentage,
        },
        **sdpa,
    )
    if folder is None:
        model = GPTNeoXForCausalLM(theirs).eval()
    else:
        logging.disable_progress_bar()  # its progress bar would mix with our output
        try:
            model = GPTNeoXForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation=sdpa).eval()
        finally:
            logging.enable_progress_bar()
    own = model.gpt_neox.rotary_emb

    def rotary(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if x.dtype != torch.float64:
            return own(x, position_ids)
        cos, sin = rotary_tables(position_ids, config.d_rope, config.rope_base, x.dtype)
        return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)

    del model.gpt_neox.rotary_emb
    model.gpt_neox.rotary_emb = rotary
    return model
