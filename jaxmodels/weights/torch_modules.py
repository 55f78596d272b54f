"""Modules of PyTorch that a configuration describes, built without values, and no larger than the tensors stored."""

import contextlib
from collections.abc import Iterator
from typing import Any

from jaxmodels.weights.stored import LARGER, SPARE, Stored, TooLarge

MODULES = 3  # for each tensor: those that have none, such as dropout


@contextlib.contextmanager
def no_larger(stored: Stored, where: str) -> Iterator[None]:
    """Context in which modules are built on the meta device, where tensors take no memory.

    Raises TooLarge, beginning with `where`, as soon as they have far more parameters and
    buffers, or modules, than tensors are stored.
    """
    import torch
    from torch.nn.modules import module

    tensors = elements = modules = 0

    def count(owner: Any, name: str, tensor: Any) -> None:
        nonlocal tensors, elements
        if tensor is not None:
            tensors, elements = tensors + 1, elements + tensor.numel()
            stored.check(Stored(tensors, elements), where)

    def count_modules(owner: Any, name: str, submodule: Any) -> None:
        nonlocal modules
        modules += 1
        if modules > MODULES * (LARGER * stored.tensors + SPARE):
            raise TooLarge(
                f"{where} describes a model of at least {modules:,} modules; stored are {stored.tensors:,} tensors"
            )

    hooks = (
        module.register_module_parameter_registration_hook(count),
        module.register_module_buffer_registration_hook(count),
        module.register_module_module_registration_hook(count_modules),
    )
    try:
        with torch.device("meta"):
            yield
    finally:
        for hook in hooks:
            hook.remove()
