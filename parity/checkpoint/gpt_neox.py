"""transformers' GPT-NeoX with the names of the twins. `transformers` is imported when a model is made."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jaxmodels.convert.hf.config import check_expressible, read_hf_json
from jaxmodels.io import manifest
from jaxmodels.io.atomic import temporary_folder
from jaxmodels.io.pretrained import read_pretrained
from jaxmodels.neox import NeoXConfig
from jaxmodels.process.failures import naming
from jaxmodels.process.texts import shortened
from jaxmodels.retro.retrieval.embedders import check_complete, offline, without_reports
from torch_ref.rope import rotary_tables


class Transformers(nn.Module):
    """transformers' GPTNeoXForCausalLM, with parts and arguments named as in the twins.

    Its weights are random; with a folder, weights and configuration are read from there, in a dtype (default: the one
    that the configuration names). Raises RuntimeError if transformers is not installed,
    ValueError if it has no setting for the configuration.
    """

    def __init__(self, config: NeoXConfig, folder: str | None = None, dtype: torch.dtype | str = "auto"):
        super().__init__()
        model = gpt_neox(config, folder, dtype)
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


def gpt_neox(config: NeoXConfig, folder: str | None = None, dtype: torch.dtype | str = "auto") -> Any:
    """GPTNeoXForCausalLM of a configuration, or of a folder.

    In a float64 model its rotary tables are float64 too, and the tanh GELU has √(2/π) in full.
    """
    try:
        import transformers
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{error}; pip install transformers") from None

    check_expressible(config)
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
        attention_bias=config.attention_bias,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": config.rope_base,
            "partial_rotary_factor": config.rope_percentage,
        },
        **sdpa,
    )
    model = GPTNeoXForCausalLM(theirs).eval() if folder is None else loaded(transformers, Path(folder), dtype, sdpa)
    own = model.gpt_neox.rotary_emb

    def rotary(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if x.dtype != torch.float64:
            return own(x, position_ids)
        cos, sin = rotary_tables(position_ids, config.d_rope, config.rope_base, x.dtype)
        return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)

    del model.gpt_neox.rotary_emb
    model.gpt_neox.rotary_emb = rotary
    if config.activation == "gelu_tanh":
        for layer in model.gpt_neox.layers:
            layer.mlp.act = TanhGELU(layer.mlp.act)
    return model


# Keys of a config.json that GPTNeoXConfig has for the model. Others may name code, kernels, or files of other formats,
# or sizes that no weight has: num_labels alone makes as many names.
KEYS = {
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "hidden_act",
    "hidden_dropout",
    "hidden_size",
    "intermediate_size",
    "layer_norm_eps",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "pad_token_id",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rotary_emb_base",
    "rotary_pct",
    "partial_rotary_factor",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_weights",
    "use_parallel_residual",
    "vocab_size",
}


def loaded(transformers: Any, folder: Path, dtype: Any, settings: dict[str, Any]) -> Any:
    """GPTNeoXForCausalLM of a folder, as transformers loads it; raises ValueError, naming the folder, if it cannot."""
    if (folder / "adapter_config.json").exists():  # with peft, transformers would load what this file names
        raise ValueError(f"{folder} has an adapter_config.json beside its weights: move it away")
    with alone(folder) as copy, without_reports(transformers), offline(str(copy)):
        try:
            model, found = transformers.GPTNeoXForCausalLM.from_pretrained(
                copy,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                weights_only=True,
                output_loading_info=True,
                **settings,
            )
            check_complete(found)
        except Exception as error:  # of many kinds, for fields that this project does not read
            first = str(error).strip().partition("\n")[0].replace(str(copy), str(folder))
            raise ValueError(f"{folder} cannot be loaded by transformers: {shortened(first, 300)}") from error
    return model.eval()


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[Path]:
    """Temporary folder with the configuration of a model, and links to its weights: for transformers to load.

    In a folder itself it may also read code (custom_generate/), adapters of other models, and shards of
    torch.distributed, which it prefers to the weights that are compared. Raises ValueError, naming the file, as
    `read_pretrained`.
    """
    content = read_hf_json(folder / "config.json")
    weights = read_pretrained(folder, name=content.get("transformers_weights"))
    links = [str(file.relative_to(folder)) for file in {weights.file, *weights.files.values()}]
    with temporary_folder("parity") as copy:
        with naming(copy / "config.json") as file:
            file.write_text(json.dumps({key: content[key] for key in KEYS & content.keys()}), encoding="utf-8")
        manifest.begin(copy, links=links)
        for name in links:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).symlink_to((folder / name).absolute())
        yield copy


class TanhGELU(nn.Module):
    """transformers' tanh GELU; in float64 PyTorch's own, as 'gelu_fast' has ten digits of √(2/π) in its source."""

    def __init__(self, own: nn.Module):
        super().__init__()
        self.own = own

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.gelu(x, approximate="tanh") if x.dtype == torch.float64 else self.own(x)
