"""Copies of a PyTorch module: in another dtype, and of the kinds that `copy.deepcopy` or `Module.to` do not copy."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def copied(
    module: nn.Module,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    *,
    shared: bool = False,
) -> nn.Module:
    """A deep copy of a module, optionally in another floating dtype and on another device.

    shared: the copy's parameters are others, but have the memory of the module's until they are replaced. Complex
    tensors stay complex, in the dtype of that width. In float64 tensors that are plain attributes of a module follow,
    as operations on mixed dtypes may fail; `Module.to` leaves them. Raises ValueError for a module that holds what
    Python does not copy.
    """
    # Tensors that were computed from parameters, such as the weight of the older `weight_norm`, refuse to be copied.
    computed = {id(t): t.detach().clone() for m in module.modules() for t in tensors(vars(m)) if t.grad_fn is not None}
    if shared:
        computed |= {
            id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad)
            for p in module.parameters()
            if type(p) is nn.Parameter
        }
    trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    with torch.no_grad():  # or copies of TorchScript's parameters are results of an operation, without gradients
        try:
            module = copy.deepcopy(module, computed)
        except TypeError as error:  # it holds a file, a lock, a generator or a module of Python
            raise ValueError(f"torch_module={type(module).__name__} cannot be copied: {error}") from error
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trained[name])
    if dtype is None and device is None:
        return module
    module._apply(lambda tensor: cast(tensor, dtype).to(device=device))  # `to` would make complex tensors real
    for part in module.modules():
        if isinstance(part, torch.jit.ScriptModule):
            continue
        for name, value in vars(part).items():
            if name not in PARTS and any(True for _ in tensors(value)):
                vars(part)[name] = moved(value, dtype if dtype == torch.float64 else None, device)
    return module


PARTS = ("_parameters", "_buffers", "_modules")


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Tensors of nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for child in value.values() if isinstance(value, dict) else value:
            yield from tensors(child)


def moved(value: Any, dtype: torch.dtype | None, device: Any) -> Any:
    """Nested tuples, lists and dicts with their tensors cast and moved."""
    if isinstance(value, nn.Parameter):  # refers to one that is registered, such as RNN's flat weights
        return value
    if isinstance(value, torch.Tensor):
        return cast(value, dtype).to(device=device)
    if isinstance(value, dict):
        changed = copy.copy(value)
        changed.update({key: moved(child, dtype, device) for key, child in value.items()})
        return changed
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(child, dtype, device) for child in value))
    return type(value)(moved(child, dtype, device) for child in value) if isinstance(value, list | tuple) else value


def cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A floating tensor in a dtype, a complex one in the complex dtype of that width, others unchanged."""
    if dtype is None or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    if tensor.is_complex():  # 16 bits: complex64, as complex32 has few operations
        return tensor.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
    return tensor.to(dtype)


@contextlib.contextmanager
def slow_paths() -> Iterator[None]:
    """Run the block without the fused inference of `nn.MultiheadAttention` and `nn.TransformerEncoder`.

    It rounds otherwise, takes no hooks, and is never differentiated.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
