"""Folders with the weights of a model, in every format that is read."""

import json
from pathlib import Path
from typing import Any

from tests.fuzz.targets.kind import SEED, Target, commands
from tests.fuzz.targets.texts import make_tokenizer, make_vocab


def neox_config(**changes: Any) -> Any:
    """Small configuration with prime sizes."""
    from jaxmodels.neox import NeoXConfig

    sizes = {"n_vocab": 21, "n_hidden": 12, "n_layers": 2, "n_heads": 3, "n_ff": 21, "max_len": 11}
    return NeoXConfig(**sizes | {"rope_percentage": 0.5} | changes)


def neox_model(**changes: Any) -> Any:
    from flax import nnx

    from jaxmodels.neox import NeoX

    return NeoX(neox_config(**changes), rngs=nnx.Rngs(SEED))


def make_model(folder: Path) -> None:
    import jaxmodels

    jaxmodels.save(neox_model(), folder)


def make_transformer(folder: Path) -> None:
    """A model whose configuration has more than sizes."""
    from flax import nnx

    import jaxmodels
    from jaxmodels.transformer import AutoregressiveTransformer

    jaxmodels.save(AutoregressiveTransformer(7, 12, 3, 20, 2, rngs=nnx.Rngs(SEED)), folder)


def make_retro(folder: Path) -> None:
    from flax import nnx

    import jaxmodels
    from jaxmodels.retro import NearestNeighborEncoder, RetroModel

    sizes = {"n_heads": 3, "d_k": 4, "d_ff": 20}
    encoder = NearestNeighborEncoder(5, 1, frozenset({0}), 12, **sizes, rngs=nnx.Rngs(SEED))
    model = RetroModel(7, 12, 2, frozenset({1}), 5, **sizes, encoder=encoder, rngs=nnx.Rngs(SEED))
    jaxmodels.save(model, folder)


def make_quantized(folder: Path, kind: str = "llm.int8") -> None:
    import jaxmodels
    from jaxmodels.neox import quantize

    jaxmodels.save(quantize(neox_model(), kind=kind), folder)


def make_lora(folder: Path) -> None:
    from flax import nnx

    import jaxmodels
    from jaxmodels.neox.lora import LoRA, LoRANeoX

    model = LoRANeoX(neox_config(), LoRA(2, 4.0), rngs=nnx.Rngs(SEED))
    jaxmodels.save(model, folder)


def make_streamed(folder: Path) -> None:
    from jaxmodels.convert.flax import write_flax
    from jaxmodels.convert.source import model_source

    write_flax(model_source(neox_model()), folder, file_bytes=5000)


def make_hf(folder: Path, file_bytes: int = 10**9) -> None:
    from jaxmodels.convert.hf import write_hf
    from jaxmodels.convert.source import model_source

    write_hf(model_source(neox_model()), folder, file_bytes=file_bytes)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2], "bos_token_id": 1}))
    make_tokenizer(folder)


def make_companions(folder: Path) -> None:
    """With everything that is copied beside the weights."""
    make_hf(folder)
    make_vocab(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")


def make_bins(folder: Path, old: bool = False) -> None:
    """As transformers once wrote it: two files of PyTorch with an index."""
    import torch
    from safetensors.torch import load_file

    make_hf(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{i:05}-of-00002.bin"
        torch.save({n: tensors[n].clone() for n in part}, folder / file, _use_new_zipfile_serialization=not old)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def make_shards(folder: Path) -> None:
    from jaxmodels.convert.neox import save_neox

    save_neox(neox_model(), folder, 3)


def make_ranks(folder: Path, old: bool = False) -> None:
    """GPT-NeoX's files without pipeline parallelism: all layers of a rank in one file, with other values beside."""
    import numpy as np
    import torch

    make_shards(folder)
    step = next(folder.glob("global_step*"))
    files = sorted(step.glob("layer_*-model_*-model_states.pt"))
    for rank in range(3):
        module: dict[str, Any] = {}
        for file in files:
            if f"model_{rank:02}-" in file.name:
                layer = int(file.name[6:8])
                found = torch.load(file, weights_only=True)
                module |= {f"sequential.{layer}.{name}": tensor.clone() for name, tensor in found.items()}
        states = {"np_rng_state": np.random.RandomState(SEED).get_state(), "torch_rng_state": torch.get_rng_state()}
        content = {"module": module, "iteration": 7, "args": {"hidden_size": 12}, **states}
        torch.save(content, step / f"mp_rank_{rank:02}_model_states.pt", _use_new_zipfile_serialization=not old)
    for file in files:
        file.unlink()


def make_adapter(folder: Path) -> None:
    """PEFT's folder, which is no model by itself."""
    from flax import nnx

    from jaxmodels.convert.peft import write_peft
    from jaxmodels.neox.lora import LoRA, LoRANeoX

    write_peft(LoRANeoX(neox_config(), LoRA(2, 4.0), rngs=nnx.Rngs(SEED)), folder)


def read_adapter(folder: Path) -> None:
    """It is refused, with a reason; the changed file may be another's, which is read."""
    import jaxmodels

    try:
        jaxmodels.load(folder)
    except ValueError as error:
        if str(folder) not in str(error):
            raise


def arrays_of(model: Any) -> list[Any]:
    """Every value of a model, in memory."""
    import jax
    import numpy as np

    return [np.asarray(leaf) for leaf in jax.tree.leaves(model)]


def load(folder: Path) -> Any:
    import jaxmodels

    return arrays_of(jaxmodels.load(folder))


def load_with_texts(folder: Path) -> Any:
    """Weights, tokenizer and end tokens."""
    from jaxmodels.convert.open import open_source

    opened = open_source(folder)
    vocabulary = opened.vocabulary()
    return opened.companions.token_ids, vocabulary.encode("abc"), vocabulary.eos, arrays_of(opened.model())


def convert(to: str, *more: str) -> Any:
    """Reader that converts a folder to another format."""
    return commands(["convert", "neox", "SUBJECT", "OUT/new", "--to", to, *more])


COMPANIONS = "[agmstv]*[!s]"  # not config.json, nor the weights

quantized = commands(["quantize", "SUBJECT", "OUT/new", "--kind", "weights-4"])
INSPECT = commands(["inspect", "SUBJECT"])
SHOW = commands(["inspect", "SUBJECT"], ["verify", "SUBJECT", "BESIDE"], ["verify", "BESIDE", "SUBJECT"])

TARGETS = (
    Target("model", make_model, load),
    Target("model's config.json", make_model, load, "config.json"),
    Target("transformer's config.json", make_transformer, load, "config.json"),
    Target("retro's config.json", make_retro, load, "config.json"),
    Target("model, int8", make_quantized, load),
    Target("model, weights", lambda folder: make_quantized(folder, "weights"), load),
    Target("model, weights-4", lambda folder: make_quantized(folder, "weights-4"), load),
    Target("model, weights-4, config.json", lambda folder: make_quantized(folder, "weights-4"), load, "config.json"),
    Target("model, weights-4, inspected", lambda folder: make_quantized(folder, "weights-4"), INSPECT),
    Target("model, LoRA", make_lora, load),
    Target("model, LoRA, inspected", make_lora, SHOW, "config.json"),
    Target("model, LoRA, converted", make_lora, convert("peft")),
    Target("model, streamed", make_streamed, load),
    Target("model, inspected", make_model, SHOW),
    Target("Hugging Face", make_hf, load_with_texts),
    Target("Hugging Face's config.json", make_hf, load_with_texts, "*config.json"),
    Target("Hugging Face, in parts", lambda folder: make_hf(folder, 3000), load),
    Target("Hugging Face, index", lambda folder: make_hf(folder, 3000), load, "*.index.json"),
    Target("Hugging Face, .bin", make_bins, load),
    Target("Hugging Face, old .bin", lambda folder: make_bins(folder, old=True), load),
    Target("Hugging Face, .bin index", make_bins, load, "*.index.json"),
    Target("Hugging Face, inspected", make_hf, SHOW),
    Target("Hugging Face, converted", make_hf, convert("neox", "--model-parallel", "3")),
    Target("Hugging Face, quantized", make_hf, quantized),
    Target("Hugging Face's companions, converted", make_companions, convert("hf"), COMPANIONS),
    Target("shards", make_shards, load),
    Target("shards' YAML", make_shards, load, "*.yml"),
    Target("shards of ranks", make_ranks, load),
    Target("shards of ranks, old", lambda folder: make_ranks(folder, old=True), load),
    Target("shards, inspected", make_shards, SHOW),
    Target("shards, converted", make_shards, convert("hf")),
    Target("PEFT adapter", make_adapter, read_adapter),
)
