"""The PyTorch side of a checkpoint: the twin of its model, or transformers' own, with its tensors."""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

import torch_ref.feedback
import torch_ref.neox
import torch_ref.retro
import torch_ref.transformer
from jaxmodels.neox import NeoXConfig
from jaxmodels.neox.config import DTYPES
from jaxmodels.process.extras import available
from jaxmodels.process.texts import quoted
from jaxmodels.weights.lazy import read
from jaxmodels.weights.names import as_tensor, is_floating, torch_dtype
from parity.checkpoint.gpt_neox import Transformers
from parity.checkpoint.opened import HF, Checkpoint

NEOX_FIELDS = NeoXConfig.__dataclass_fields__


def reference(checkpoint: Checkpoint) -> tuple[nn.Module, str]:
    """PyTorch's module of a checkpoint that `of_model` returned, and a note that says which one it is.

    For a folder in Hugging Face's format that is transformers' own, if it is installed; else the twin in `torch_ref`.
    Raises ValueError if the model has no twin, and as `check_dtypes`.
    """
    check_dtypes(checkpoint)
    where = Path(checkpoint.where).name
    if checkpoint.format == HF and available("transformers"):
        dtype = getattr(torch, widest(checkpoint.tensors).name)
        module = Transformers(NeoXConfig(**dict(checkpoint.config)), checkpoint.where, dtype)
        version = importlib.metadata.version("transformers")
        gelu = "; its tanh GELU has √(2/π) in full in float64" if checkpoint.config["activation"] == "gelu_tanh" else ""
        return module, f"PyTorch runs transformers {version}'s GPTNeoXForCausalLM, loaded from {where}{gelu}"
    missing = " (transformers is not installed)" if checkpoint.format == HF else ""
    return filled(checkpoint), f"PyTorch runs torch_ref's {checkpoint.model} with the tensors of {where}{missing}"


def check_dtypes(checkpoint: Checkpoint) -> None:
    """Raise ValueError, naming the file, for floats that NumPy and PyTorch do not exchange, such as those of 8 bits."""
    for name, tensor in checkpoint.tensors.items():
        dtype = np.dtype(tensor.dtype).name
        if is_floating(tensor.dtype) and dtype not in DTYPES:
            raise ValueError(f"{checkpoint.where}: {quoted(name)} is {dtype}; PyTorch runs {', '.join(DTYPES)}")


def filled(checkpoint: Checkpoint) -> nn.Module:
    """The twin with the tensors of a checkpoint, which share memory with it where they can."""
    with torch.device("meta"):  # neither allocated nor initialized: every tensor is replaced
        module = twin(checkpoint.model, checkpoint.config)
    module.load_state_dict({name: tensor_of(value) for name, value in checkpoint.tensors.items()}, assign=True)
    return module


def twin(model: str, config: Mapping[str, Any]) -> nn.Module:
    """A newly made PyTorch twin of a registered model; raises ValueError if there is none."""
    settings = dict(config)
    match model:
        case "AutoregressiveTransformer":
            return torch_ref.transformer.AutoregressiveTransformer(**settings)
        case "AutoregressiveModel":
            n_vocab, variant = settings.pop("n_vocab"), settings.pop("variant")
            return torch_ref.feedback.AutoregressiveModel(n_vocab, getattr(torch_ref.feedback, variant)(**settings))
        case "RetroModel":
            encoder = settings.pop("encoder", None)
            built = None if encoder is None else torch_ref.retro.NearestNeighborEncoder(**encoder)
            return torch_ref.retro.RetroModel(**settings, encoder=built)
        case "NeoX":
            return torch_ref.neox.NeoX(NeoXConfig(**{n: value for n, value in settings.items() if n in NEOX_FIELDS}))
    raise ValueError(f"{model} has no PyTorch twin in torch_ref; torch_module must be a torch.nn.Module for it")


def tensor_of(value: Any) -> torch.Tensor:
    """A torch tensor of an array's or a lazy tensor's values; a writable array's memory is shared."""
    shared = isinstance(value, np.ndarray) and value.flags.writeable
    tensor: torch.Tensor = as_tensor(value if shared else read(value))
    return tensor


def widest(tensors: Mapping[str, Any]) -> np.dtype:
    """The floating dtype that holds all tensors."""
    found: Any = jnp.promote_types
    dtypes = [np.dtype(tensor.dtype) for tensor in tensors.values() if is_floating(tensor.dtype)]
    wide = dtypes[0]
    for dtype in dtypes[1:]:
        wide = wide if dtype == wide else np.dtype(found(wide, dtype))
    return wide


def cast_like(module: nn.Module, tensors: Mapping[str, Any]) -> None:
    """Cast a module's tensors to the dtypes of others of the same names."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name in tensors and tensor.is_floating_point():
            tensor.data = tensor.data.to(torch_dtype(torch, np.dtype(tensors[name].dtype)))
