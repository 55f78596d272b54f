"""Models of a Hugging Face folder in transformers, as published and quantized by torchao and bitsandbytes."""

import argparse
import contextlib
import copy
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported once the processors are set
    import numpy as np

LINEARS = (("attention", "query_key_value"), ("attention", "dense"), ("mlp", "dense_h_to_4h"), ("mlp", "dense_4h_to_h"))
PEERS = {
    "transformers, float32": (None, lambda folder: loaded(folder, "float32")),
    "transformers, bfloat16": (None, lambda folder: loaded(folder, "bfloat16")),
    "torchao, 8-bit weights": ("torchao", lambda folder: with_torchao(loaded(folder, "float32"))),
    "bitsandbytes, LLM.int8": ("bitsandbytes", lambda folder: with_bitsandbytes(loaded(folder, "float32"), 8)),
    "bitsandbytes, 4 bits (NF4)": ("bitsandbytes", lambda folder: with_bitsandbytes(loaded(folder, "float32"), 4)),
}


def add_timing(arguments: argparse.ArgumentParser) -> None:
    """Add the options of a comparison of models that write."""
    add = arguments.add_argument
    add("--prompt", type=int, default=32, metavar="S", help="tokens of the prompt (default 32)")
    add("--tokens", type=int, default=32, metavar="N", help="tokens to write (default 32)")
    add("--rounds", type=int, default=5, help="timed calls of each (default 5)")
    add("--threads", type=int, default=2, help="CPU threads (default 2)")


def peers(folder: Path) -> Iterator[tuple[str, Any]]:
    """Names and models; instead of a model the reason why it cannot be used, in one line."""
    for name, (package, make) in PEERS.items():
        if package is not None and importlib.util.find_spec(package) is None:
            yield name, f"{package} is not installed"
            continue
        try:
            yield name, make(folder)
        except Exception as error:  # of a package that does not run on this processor or with this torch
            yield name, f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


def loaded(folder: Path, dtype: str | None = None) -> Any:
    """The folder's model; by default in the dtype that transformers chooses."""
    import torch
    from transformers import AutoModelForCausalLM

    more = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    return AutoModelForCausalLM.from_pretrained(folder, **more).eval()


def with_torchao(model: Any) -> Any:
    """The model with 8-bit weights in all linear maps and activations as they are, one scale per output."""
    torchao = importlib.import_module("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def with_bitsandbytes(model: Any, bits: int) -> Any:
    """The model with the linear maps of its blocks in 8 bits (LLM.int8) or 4 (NF4), as transformers replaces them."""
    import torch

    nn = importlib.import_module("bitsandbytes.nn")
    for layer in model.gpt_neox.layers:
        for owner, name in LINEARS:
            part = getattr(layer, owner)
            linear = getattr(part, name)
            sizes = (linear.in_features, linear.out_features, linear.bias is not None)
            if bits == 8:
                new = nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
            else:
                new = nn.Linear4bit(*sizes, quant_type="nf4", compute_dtype=torch.float32)
            new.load_state_dict(linear.state_dict())
            setattr(part, name, new.to("cpu"))  # which quantizes
    return model


def nbytes(model: Any) -> int:
    """Bytes of a model's parameters, with the scales of quantized ones."""

    def size(tensor: Any) -> int:
        names = getattr(tensor, "tensor_data_names", None)  # of torchao
        if names is not None:
            return sum(size(getattr(tensor, name)) for name in names)
        scales = [getattr(tensor, "SCB", None), getattr(getattr(tensor, "quant_state", None), "absmax", None)]
        return tensor.nbytes + sum(scale.nbytes for scale in scales if scale is not None)  # of bitsandbytes

    return sum(size(parameter) for parameter in model.parameters())


def loss(model: Any, window: "np.ndarray") -> float:
    """Mean loss of a window's tokens but the first, each after those before it."""
    import torch

    ids = torch.as_tensor(window)[None].long()
    with quiet():
        logits = model(ids[:, :-1]).logits[0].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))


def writer(model: Any, ids: "np.ndarray", tokens: int) -> Callable[[], object]:
    """Greedy decoding of a number of tokens after a prompt [1, S] that was read already."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with quiet():
        first: torch.Tensor = (
            model(torch.as_tensor(ids), past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        )

    def write() -> None:
        token, own = first, copy.deepcopy(cache)  # a copy of a few MB
        with quiet():
            for _ in range(tokens):
                token = model(token, past_key_values=own, use_cache=True).logits.argmax(-1)

    return write


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Compute without gradients, and without the warnings of bitsandbytes on every cast of activations."""
    import warnings

    import torch

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
