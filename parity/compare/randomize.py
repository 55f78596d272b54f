"""Perturb a PyTorch module's constant tensors, which hide how they are used."""

import copy

import torch
from torch import nn


def randomized(module: nn.Module, seed: int) -> nn.Module:
    """A copy in which every constant parameter (zeros, ones) is perturbed: a zero hides how it is used.

    Running means and variances of a BatchNorm that still have their initial values are perturbed too.
    """
    module = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if (parameter == parameter.flatten()[0]).all():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.3 * noise.to(parameter))
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "running_var")) and (buffer == buffer.flatten()[0]).all():
                noise = torch.randn(buffer.shape, generator=generator, dtype=torch.float64).to(buffer)
                buffer.copy_((0.3 * noise).exp() * buffer if name.endswith("var") else buffer + 0.3 * noise)
    return module
