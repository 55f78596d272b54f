"""GPT-NeoX checkpoints as GPT-NeoX itself writes them, made with torch alone: nothing here knows the converter."""

import dataclasses
import json

import numpy as np
import torch

from jaxmodels.neox import NeoXConfig

# 12 heads can be shared by 1, 2, 3, 4 and 6 ranks; no two sizes are equal, no width is a power of two.
CONFIG = NeoXConfig(
    n_vocab=84, n_hidden=120, n_layers=3, n_heads=12, rope_percentage=0.4, rope_base=9_000.0, n_ff=156, max_len=77
)
# RMSNorm, 6 heads of keys and values for 12 of queries, no biases: 1, 2, 3 or 6 ranks.
VARIANT = dataclasses.replace(
    CONFIG, norm="rmsnorm", layer_norm_eps=3e-6, n_kv_heads=6, attention_bias=False, ffn_bias=False
)
DIVISIBLE_BY = 7  # rows of the vocabulary: a multiple of 7 for each rank, so that 84 fit every degree

FREQUENCIES = "attention.rotary_emb.inv_freq"

NAMES = {
    "classic": {},
    "newer": {"dense_h_to_4h": "linear1", "dense_4h_to_h": "linear2"},
    "transformer_engine": {
        "attention.query_key_value": "attention.qkv",
        "attention.dense": "attention.proj",
        "mlp.dense_h_to_4h.": "mlp.fc1_",
        "mlp.dense_4h_to_h.": "mlp.fc2_",
        "post_attention_layernorm.": "mlp.layer_norm_",
    },
}


def state_dict(config=CONFIG, dtype=torch.float16, seed=0):
    """The twin's tensors, in its names, drawn at random."""
    torch.manual_seed(seed)
    d, f = config.n_hidden, config.d_ff
    block = {
        "pre_ln_attn": (d,),
        "pre_ln_ffn": (d,),
        "attention.qkv_lin": (d + 2 * d // config.n_heads * (config.n_kv_heads or config.n_heads), d),
        "attention.output": (d, d),
        "ffn.dense_h_h4": (f, d),
        "ffn.dense_h4_h": (d, f),
    }
    shapes = {"embedding.emb.weight": (config.n_vocab, d)}
    for i in range(config.n_layers):
        for name, shape in block.items():
            shapes |= {f"layers.{i}.{name}.weight": shape, f"layers.{i}.{name}.bias": shape[:1]}
    shapes |= {"final_norm.ln.weight": (d,), "final_norm.ln.bias": (d,)}
    shapes = {name: shape for name, shape in shapes.items() if not name.endswith("bias") or has_bias(config, name)}
    if not config.tied:
        shapes["readout.linear.weight"] = (config.n_vocab, d)
    return {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def has_bias(config, name):
    if ".attention." in name or ".ffn." in name:
        return config.attention_bias if ".attention." in name else config.ffn_bias
    return config.norm == "layernorm"


def shares_of_qkv(tensor, config, ranks):
    """Shares of ranks; with fewer heads of keys and values, each is its queries, then its keys, then its values."""
    if config.n_kv_heads is None:
        return tensor.chunk(ranks)
    d_k = config.n_hidden // config.n_heads
    heads = tensor.reshape(config.n_kv_heads, -1, d_k, *tensor.shape[1:])  # [key-value head, (queries, key, value), …]
    return [
        torch.cat([kind.flatten(0, 2) for kind in (own[:, :-2], own[:, -2:-1], own[:, -1:])])
        for own in heads.chunk(ranks)
    ]


def shard(state, config, ranks, seed=1):
    """[rank][XX][name on disk] -> tensor: what each rank of GPT-NeoX keeps of a model."""
    torch.manual_seed(seed)
    out = [{} for _ in range(ranks)]

    def put(layer, name, parts):
        for rank, part in enumerate(parts):
            out[rank].setdefault(layer, {})[name] = part.clone()

    put(0, "word_embeddings.weight", state["embedding.emb.weight"].chunk(ranks))
    for i in range(config.n_layers):
        at = f"layers.{i}."
        lasts = {"weight": "weight", "bias": "bias"} if config.norm == "layernorm" else {"weight": "scale"}
        for ours, theirs in (("pre_ln_attn", "input_layernorm"), ("pre_ln_ffn", "post_attention_layernorm")):
            for last, said in lasts.items():
                put(i + 2, f"{theirs}.{said}", [state[f"{at}{ours}.{last}"]] * ranks)
        for last in ("weight", "bias") if config.attention_bias else ("weight",):
            parts = shares_of_qkv(state[f"{at}attention.qkv_lin.{last}"], config, ranks)
            put(i + 2, f"attention.query_key_value.{last}", parts)
        for last in ("weight", "bias") if config.ffn_bias else ("weight",):
            put(i + 2, f"mlp.dense_h_to_4h.{last}", state[f"{at}ffn.dense_h_h4.{last}"].chunk(ranks, dim=0))
        for ours, theirs in (("attention.output", "attention.dense"), ("ffn.dense_h4_h", "mlp.dense_4h_to_h")):
            put(i + 2, f"{theirs}.weight", state[f"{at}{ours}.weight"].chunk(ranks, dim=1))
            if not has_bias(config, f"{at}{ours}.bias"):
                continue
            bias = state[f"{at}{ours}.bias"]
            parts = [bias] * ranks
            if config.parallel_residual and ranks > 1:
                # The ranks' own biases are unlike each other; multiples of 1/64 below 2 add up exactly in 16 bits.
                parts = [torch.randint(-127, 128, bias.shape).to(bias.dtype) / 64 for _ in range(ranks)]
                state[f"{at}{ours}.bias"] = torch.stack(parts).double().sum(0).to(bias.dtype)
            put(i + 2, f"{theirs}.bias", parts)
        put(i + 2, FREQUENCIES, [frequencies(config)] * ranks)
    end = config.n_layers + 3
    for last, said in lasts.items():
        put(end, f"norm.{said}", [state[f"final_norm.ln.{last}"]] * ranks)
    if not config.tied:
        put(end + 1, "final_linear.weight", state["readout.linear.weight"].chunk(ranks))
    return out


def frequencies(config):
    d = int(config.n_hidden // config.n_heads * config.rope_percentage)
    return (1.0 / config.rope_base ** (torch.arange(0, d, 2).float() / d)).half()


def renamed(tensors, names):
    for old, new in NAMES[names].items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    if names == "transformer_engine":
        tensors = tensors | {"mlp._extra_state": None, "attention.qkv._extra_state": torch.zeros(3, dtype=torch.uint8)}
    return tensors


def layer_file(folder, layer, rank):
    return folder / "global_step143" / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"


def write(folder, ranks=2, config=CONFIG, *, dtype=torch.float16, names="classic", yaml=True, old_format=False):
    """Writes a checkpoint in layer files and returns the twin's tensors that it stands for."""
    state = state_dict(config, dtype)
    step = folder / "global_step143"
    step.mkdir(parents=True)
    for rank, layers in enumerate(shard(state, config, ranks)):
        for layer, tensors in layers.items():
            if 2 <= layer < config.n_layers + 2:
                tensors = renamed(tensors, names)
            torch.save(tensors, layer_file(folder, layer, rank), _use_new_zipfile_serialization=not old_format)
        torch.save({"module": None, "iteration": 143}, step / f"mp_rank_{rank:02d}_model_states.pt")
    (folder / "latest").write_text("global_step143\n")
    if yaml:
        write_yaml(folder / "configs", config, ranks)
    return state


def write_rank_files(folder, ranks=2, config=CONFIG, *, dtype=torch.float16, yaml=True):
    """The same in one file for each rank, beside NumPy's random state, as without pipeline parallelism."""
    state = state_dict(config, dtype)
    step = folder / "global_step143"
    step.mkdir(parents=True)
    for rank, layers in enumerate(shard(state, config, ranks)):
        module = {f"sequential.{layer}.{name}": t for layer, tensors in layers.items() for name, t in tensors.items()}
        generator = ("MT19937", np.arange(624, dtype=np.uint32), 624, 0, 0.0)
        content = {"module": module, "np_rng_state": generator, "random_rng_state": (3, (1, 2), None), "iteration": 143}
        torch.save(content, step / f"mp_rank_{rank:02d}_model_states.pt")
    (folder / "latest").write_text("global_step143")
    if yaml:
        write_yaml(step / "configs", config, ranks)
    return state


def settings(config, ranks):
    said = {}
    if config.norm == "rmsnorm":
        said["rms-norm-epsilon"] = config.layer_norm_eps
    if config.n_kv_heads is not None:
        said["num-kv-heads"] = config.n_kv_heads
    if not config.attention_bias:
        said["use_bias_in_attn_linear"] = False
    if not config.ffn_bias:
        said["use_bias_in_mlp"] = False
    return said | {
        "num-layers": config.n_layers,
        "hidden-size": config.n_hidden,
        "num-attention-heads": config.n_heads,
        "rotary-pct": config.rope_percentage,
        "rotary_emb_base": int(config.rope_base),
        "intermediate_size": config.d_ff,
        "no-weight-tying": not config.tied,
        "gpt_j_residual": config.parallel_residual,
        "pos-emb": "rotary",
        "norm": config.norm,
        "max-position-embeddings": config.max_len,
        "bias-gelu-fusion": config.activation == "gelu_tanh",
        "make_vocab_size_divisible_by": DIVISIBLE_BY,
        "model-parallel-size": ranks,
    }


def write_yaml(folder, config, ranks, **others):
    """Two files, with comments and trailing commas, as the released ones have them."""
    folder.mkdir(parents=True)
    lines = [f'  "{key}": {json.dumps(value)},' for key, value in (settings(config, ranks) | others).items()]
    (folder / "model.yml").write_text("# GPT-NeoX\n{\n" + "\n".join(lines[:5]) + "  # sizes\n}\n")
    (folder / "rest.yml").write_text("{\n" + "\n".join([*lines[5:], '  "train-iters": 143000,']) + "\n}\n")
