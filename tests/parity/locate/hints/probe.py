"""What the hint for a call of a module is, given what Flax returns."""

import numpy as np
import torch

from parity.compare.inputs import named_leaves
from parity.locate.hints.search import hint


def hint_of(module: torch.nn.Module, flax_output, *inputs) -> str:
    """The hint for module(*inputs); flax_output: an array, or a function of NumPy inputs."""
    module = module.double().eval()
    tensors = [torch.as_tensor(x) for x in inputs]

    def repeat(part: torch.nn.Module) -> list[torch.Tensor]:
        with torch.no_grad():
            output = part(*tensors)
        return [t for t in named_leaves(output, torch.Tensor).values() if t.is_floating_point()]

    given = flax_output(*map(np.asarray, inputs)) if callable(flax_output) else flax_output
    right = [t.numpy() for t in repeat(module)]
    before = {n: t.clone() for n, t in module.state_dict().items()}
    found = hint(module, repeat, [np.asarray(given, np.float64)], right[:1])
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    return found
