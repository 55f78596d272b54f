"""Perturb a PyTorch module's constant tensors, which hide how they are used."""

from collections.abc import Callable

import torch
from torch import nn

from parity.compare.sides.torch_copy import copied

SPREAD = 0.3  # standard deviation of the perturbation
MASKED = 1e3  # a constant buffer of this magnitude is a mask's


def randomized(
    module: nn.Module,
    seed: int,
    carried: Callable[[str], bool] = lambda name: True,
    kept: Callable[[str], bool] = lambda name: False,
) -> nn.Module:
    """A copy in which every constant parameter (zeros, ones) is perturbed: a zero hides how it is used.

    Constant floating buffers, such as a BatchNorm's running statistics or a mean and a standard deviation of inputs,
    are perturbed too if they are `carried` to the other side; nonzero ones keep their sign. Masks (integers, booleans,
    large constants) and buffers outside of the state_dict are left alone, and so are parameters and buffers that are
    to be `kept`. The copy shares the memory of parameters that are not perturbed.
    """
    module = copied(module, shared=True)
    generator = torch.Generator().manual_seed(seed)
    saved = module.state_dict().keys()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if is_constant(parameter) and not kept(name):
                parameter.data = parameter + SPREAD * noise_like(parameter, generator)
        for name, buffer in module.named_buffers():
            if name not in saved or not is_constant(buffer) or kept(name) or not carried(name):
                continue
            if buffer.flatten()[0].abs() < MASKED:
                noise = SPREAD * noise_like(buffer, generator)
                buffer.copy_(buffer + noise if buffer.flatten()[0] == 0 else buffer * noise.exp())
    return module


def is_constant(tensor: torch.Tensor) -> bool:
    """True for a floating or complex tensor whose elements are all equal."""
    inexact = tensor.is_floating_point() or tensor.is_complex()
    return inexact and tensor.numel() > 0 and bool((tensor == tensor.flatten()[0]).all())


def noise_like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Normal noise of a tensor's shape, dtype and device; complex for a complex one."""
    dtype = torch.complex128 if tensor.is_complex() else torch.float64
    return torch.randn(tensor.shape, generator=generator, dtype=dtype).to(tensor)
