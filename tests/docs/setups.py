"""The surroundings of a page's Python blocks: names defined before them, and files in the current folder."""

import dataclasses
import importlib.util
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
Namespace = dict[str, Any]


def nothing() -> Namespace:
    return {}


def mlp() -> Namespace:
    """A pair of the page on the pytest plugin, as `torch_module`, `flax_module` and `x`."""
    import torch
    from flax import nnx

    import parity

    page = (ROOT / "docs" / "parity" / "pytest.md").read_text(encoding="utf-8")
    namespace: Namespace = {}
    exec(page.partition("```python\n")[2].partition("@pytest.mark")[0], namespace)
    torch.manual_seed(0)
    pair = {"torch_module": namespace["TorchMLP"](), "flax_module": namespace["FlaxMLP"](rngs=nnx.Rngs(0))}
    return {"parity": parity, "inputs": {"x": namespace["x"]}, **pair, "x": namespace["x"]}


def gpt2() -> Namespace:
    """The worked example: its modules, with the names of its report."""
    import torch

    spec = importlib.util.spec_from_file_location("gpt2", ROOT / "examples" / "gpt2.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    from flax import nnx

    torch.manual_seed(0)
    ids = np.random.default_rng(0).integers(0, example.VOCABULARY, (2, 12))
    return {
        "torch_module": example.Logits().eval(),
        "flax_module": example.GPT2(rngs=nnx.Rngs(0)),
        "NAMES": example.NAMES,
        "ids": ids[:, :-1],
        "next_ids": ids[:, 1:],
    }


def language_model() -> Namespace:
    """A small pair of this project, with ids [S, B], and what the page of further readings takes beside it."""
    import optax
    import torch
    from flax import nnx

    import parity
    import torch_ref.neox
    import torch_ref.rope
    import torch_ref.transformer
    from jaxmodels.neox import NeoX, NeoXConfig
    from jaxmodels.transformer import AutoregressiveTransformer

    torch.manual_seed(0)
    sizes = (13, 8, 2, 11, 1)  # n_vocab, d_model, heads, d_ff, n_layers
    ids = np.random.default_rng(0).integers(0, 13, (7, 3))
    return {
        "torch_module": torch_ref.transformer.AutoregressiveTransformer(*sizes, "rotary", 0.0).eval(),
        "flax_module": AutoregressiveTransformer(*sizes, "rotary", 0.0, rngs=nnx.Rngs(0)),
        "inputs": {"ids": ids[:-1]},
        "ids": ids[:-1],
        "next_ids": ids[1:],
        "parity": parity,
        "nnx": nnx,
        "torch_ref": torch_ref,
        "NeoX": NeoX,
        "NeoXConfig": NeoXConfig,
        "schedule": optax.constant_schedule(1e-3),
    }


def pythia(*folders: str) -> Callable[[], Namespace]:
    """Folders like Pythia's, tiny and with random weights and a tokenizer, in Hugging Face's format."""

    def make() -> Namespace:
        from flax import nnx
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        from jaxmodels.convert.hf import save_hf
        from jaxmodels.neox import NeoX, NeoXConfig

        texts = ["The capital of France is Paris.", "A second, longer document.", "Once the value of text"]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        config = NeoXConfig(n_vocab=6000, n_hidden=16, n_layers=1, n_heads=2)
        for folder in folders:
            save_hf(NeoX(config, rngs=nnx.Rngs(0)), folder)
            tokenizer.save(f"{folder}/tokenizer.json")
            file = Path(folder) / "config.json"
            said = json.loads(file.read_text()) | {"eos_token_id": 0, "bos_token_id": 0}
            file.write_text(json.dumps(said))
        return {}

    return make


def shards() -> Namespace:
    """A folder of GPT-NeoX shards, and a placement on one device."""
    import jax
    from flax import nnx

    from jaxmodels.convert.neox import save_neox
    from jaxmodels.neox import NeoX, NeoXConfig

    save_neox(NeoX(NeoXConfig(n_vocab=64, n_hidden=16, n_layers=1, n_heads=2), rngs=nnx.Rngs(0)), "shards")
    return {"place": lambda path, shape: jax.sharding.SingleDeviceSharding(jax.devices()[0])}


def retro() -> Namespace:
    """A RETRO model, ids of a text, and neighbors."""
    import jax.numpy as jnp
    from flax import nnx

    from jaxmodels.retro import NearestNeighborEncoder, RetroModel
    from jaxmodels.text import CharVocabulary

    rng = np.random.default_rng(0)
    vocabulary = CharVocabulary("".join(map(chr, range(97, 120))))
    encoder = NearestNeighborEncoder(16, 1, {0}, 8, 2, 4, 16, rngs=nnx.Rngs(0))
    model = RetroModel(len(vocabulary), 8, 2, {1}, 16, 2, 4, 16, encoder, rngs=nnx.Rngs(0))
    return {
        "ids": rng.integers(0, len(vocabulary), 6000),
        "vocabulary": vocabulary,
        "model": model,
        "x": jnp.zeros((1, 32), jnp.int32),
        "ret": jnp.zeros((1, 2, 2, 32), jnp.int32),
    }


def experiment() -> Namespace:
    """The file that `jaxmodels new` writes, with a small text."""
    from jaxmodels.training.commands import template

    text = Path("text.txt")
    text.write_text("To be, or not to be, that is the question.\n" * 100)
    kind = template.EXPERIMENT.config_class
    small = dataclasses.replace(kind(), text=str(text), steps=3, warmup=1, every=3, seq_len=16, batch_size=2)
    return {"MyExperiment": template.EXPERIMENT, "Config": types.SimpleNamespace(small=lambda: small)}


def model_class() -> Namespace:
    """Imports of the page's class."""
    from flax import nnx
    from jax.sharding import PartitionSpec

    import jaxmodels

    return {"jaxmodels": jaxmodels, "nnx": nnx, "P": PartitionSpec}


SETUPS: dict[str, Callable[[], Namespace]] = {
    "docs/guides/checkpoints.md": pythia("pythia-tiny", "EleutherAI/pythia-70m", "runs/first"),
    "docs/guides/convert.md": pythia("EleutherAI/pythia-70m"),
    "docs/guides/experiments.md": experiment,
    "docs/guides/generation.md": pythia("pythia-70m"),
    "docs/guides/models.md": model_class,
    "docs/guides/neox.md": shards,
    "docs/guides/retro.md": retro,
    "docs/guides/scoring.md": pythia("SOURCE"),
    "docs/parity/check.md": gpt2,
    "docs/parity/fixtures.md": mlp,
    "docs/parity/readings.md": language_model,
    "docs/parity/reports.md": mlp,
}
