"""Folders as transformers and torch write them, with small random weights: nothing here knows the converter."""

import json
from pathlib import Path

import safetensors.torch
import torch
import transformers

# No two sizes are equal.
SIZES = {
    "vocab_size": 84,
    "hidden_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 156,
    "max_position_embeddings": 77,
}
ROPE = {"rope_type": "default", "rope_theta": 9_000.0, "partial_rotary_factor": 0.4}
D_ROPE = 4


def model(dtype=torch.float16, seed=0, **config) -> transformers.GPTNeoXForCausalLM:
    torch.manual_seed(seed)
    made = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**SIZES | {"rope_parameters": ROPE, "bos_token_id": 0, "eos_token_id": 0} | config)
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter))
    return made.to(dtype).eval()


def published(made) -> dict[str, torch.Tensor]:
    """State_dict under the names in files, which are not those in memory."""
    return {name.replace("lm_head.", "embed_out."): tensor for name, tensor in made.state_dict().items()}


def buffers(mask=torch.uint8, frequencies=torch.float16, size=77) -> dict[str, torch.Tensor]:
    """Masks and rotary frequencies, which older versions of transformers saved beside the parameters."""
    found = {}
    for i in range(SIZES["num_hidden_layers"]):
        at = f"gpt_neox.layers.{i}.attention."
        found[f"{at}bias"] = torch.ones(size, size).tril().to(mask)[None, None]
        found[f"{at}masked_bias"] = torch.tensor(-1e9).to(frequencies)
        inverse = 1 / 9_000.0 ** (torch.arange(0, D_ROPE, 2) / D_ROPE)
        found[f"{at}rotary_emb.inv_freq"] = inverse.to(frequencies)
    return found


def write_config(folder: Path, made, **values) -> Path:
    """config.json of a model, with other values; None removes a key."""
    folder.mkdir(parents=True, exist_ok=True)
    made.config.save_pretrained(folder)
    edit_config(folder, architectures=["GPTNeoXForCausalLM"], **values)
    return folder


def edit_config(folder: Path, **values) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def write_bin(folder: Path, state, name="pytorch_model.bin", **options) -> None:
    torch.save(state, folder / name, **options)


def write_safetensors(folder: Path, state, name="model.safetensors") -> None:
    state = {name: tensor.clone().contiguous() for name, tensor in state.items()}
    safetensors.torch.save_file(state, folder / name, {"format": "pt"})


def write_index(folder: Path, weight_map, name: str) -> None:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def write_shards(folder: Path, state, kind="bin", variant="") -> dict[str, str]:
    """Two files and their index; returns the index's map."""
    stem, suffix = ("pytorch_model", "bin") if kind == "bin" else ("model", "safetensors")
    weight_map = {}
    for i, part in enumerate((list(state)[:11], list(state)[11:])):
        name = f"{stem}{variant}-{i + 1:05}-of-00002.{suffix}"
        (write_bin if kind == "bin" else write_safetensors)(folder, {key: state[key] for key in part}, name)
        weight_map |= dict.fromkeys(part, name)
    write_index(folder, weight_map, f"{stem}.{suffix}.index{variant}.json")
    return weight_map
