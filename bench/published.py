"""Hugging Face folders with random weights and the buffers of older files, for `bench.neox_shards`."""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FORMS = ("bin", "old-bin", "bins", "safetensors")
MASK = 2_048  # rows of the causal mask that older files have in each block
BLOCK = {
    "attention.query_key_value": (3, 1),
    "attention.dense": (1, 1),
    "mlp.dense_h_to_4h": (4, 1),
    "mlp.dense_4h_to_h": (1, 4),
}
NORMS = ("input_layernorm", "post_attention_layernorm")

Values = Callable[..., "torch.Tensor"]


def make(folder: Path, form: str, blocks: int, options: argparse.Namespace, values: Values) -> None:
    """Write a folder.

    form: 'bin', one pytorch_model.bin; 'old-bin', the same in the format before torch 1.6; 'bins', shards with an
    index; 'safetensors'. values: function of a shape that returns random float16 tensors.
    """
    import safetensors.torch
    import torch

    folder.mkdir(parents=True)
    state = dict(tensors(blocks, options, values))
    if form == "safetensors":
        safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    elif form == "bins":
        weight_map: dict[str, str] = {}
        for i in range(4):
            part = {name: state[name] for name in list(state)[i::4]}
            name = f"pytorch_model-{i + 1:05}-of-00004.bin"
            torch.save(part, folder / name)
            weight_map |= dict.fromkeys(part, name)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    else:
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin")
    config = {
        "model_type": "gpt_neox",
        "vocab_size": options.vocabulary,
        "hidden_size": options.hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": options.heads,
        "intermediate_size": 4 * options.hidden,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    os.sync()  # otherwise the disk would still be writing this during the first conversion


def tensors(blocks: int, options: argparse.Namespace, values: Values) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Iterate over the names and values of all tensors."""
    import torch

    hidden, rotary = options.hidden, options.hidden // options.heads // 4
    yield "gpt_neox.embed_in.weight", values(options.vocabulary, hidden)
    for i in range(blocks):
        at = f"gpt_neox.layers.{i}."
        for name in NORMS:
            yield f"{at}{name}.weight", values(hidden)
            yield f"{at}{name}.bias", values(hidden)
        for name, (out, width) in BLOCK.items():
            yield f"{at}{name}.weight", values(out * hidden, width * hidden)
            yield f"{at}{name}.bias", values(out * hidden)
        yield f"{at}attention.bias", torch.ones(MASK, MASK, dtype=torch.uint8).tril()[None, None]
        yield f"{at}attention.masked_bias", torch.tensor(-1e9).half()
        yield f"{at}attention.rotary_emb.inv_freq", (1 / 10_000 ** (torch.arange(0, rotary, 2) / rotary)).half()
    yield "gpt_neox.final_layer_norm.weight", values(hidden)
    yield "gpt_neox.final_layer_norm.bias", values(hidden)
    yield "embed_out.weight", values(options.vocabulary, hidden)
