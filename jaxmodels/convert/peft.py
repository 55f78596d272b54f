"""LoRA adapters in the format of PEFT: adapter_config.json and adapter_model.safetensors.

base_model.model.gpt_neox.layers.N.attention.query_key_value.lora_A.weight    A transposed, [R, I]
base_model.model.gpt_neox.layers.N.attention.query_key_value.lora_B.weight    B transposed, [O, R]
"""

import json
import os
from typing import Any

from jaxmodels.convert.companions import Companions
from jaxmodels.convert.hf.config import check_expressible
from jaxmodels.convert.neox.layout import hf_name
from jaxmodels.io.atomic import atomic_folder
from jaxmodels.io.formats.safetensors import write_file
from jaxmodels.neox.lora import LoRA, LoRANeoX
from jaxmodels.weights.lazy import Transposed
from jaxmodels.weights.place import tensors_of

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
FACTORS = {"lora_a": "lora_A", "lora_b": "lora_B"}


def write_peft(
    model: LoRANeoX,
    folder: str | os.PathLike,
    base: str | None = None,
    companions: Companions | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write the adapter of a model for `peft.PeftModel.from_pretrained(base model, folder)`, atomically.

    base: name of the base model to store, a Hub id or the path of a Hugging Face folder. companions: tokenizer files to
    copy. Raises ValueError like `jaxmodels.save`, if the model has no adapter or is not finite with it, or if
    transformers has no setting for the base model's configuration.
    """
    if not isinstance(model, LoRANeoX):
        raise ValueError(f"model is a {type(model).__name__}; PEFT's format needs one with a LoRA adapter")
    check_expressible(model.settings)
    model.merged()  # raises as `jaxmodels.load` would
    tensors = {peft_name(key): Transposed(tensor) for key, tensor in tensors_of(model).items() if is_factor(key)}
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        if companions is not None:
            companions.write(temporary)
        write_file(temporary / WEIGHTS, tensors)
        text = json.dumps(peft_config(model.lora, base), indent=2, sort_keys=True)
        (temporary / CONFIG).write_text(text + "\n", encoding="utf-8")


def is_factor(key: str) -> bool:
    """True for the names of an adapter's two factors."""
    return key.rpartition(".")[2] in FACTORS


def peft_name(key: str) -> str:
    """Name in PEFT's files of a factor: layers.0.attention.qkv_lin.lora_a."""
    owner, _, factor = key.rpartition(".")
    return f"{PREFIX}{hf_name(f'{owner}.weight').removesuffix('.weight')}.{FACTORS[factor]}.weight"


def peft_config(lora: LoRA, base: str | None) -> dict[str, Any]:
    """Content of adapter_config.json; what is not here has PEFT's defaults, which compute W + α/R · AB."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.targets),
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
