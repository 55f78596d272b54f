"""`Weights`: the conversion between a PyTorch module's tensors and the arrays of a Flax model, in both directions."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxmodels.weights.names import Path


class Parameter(Protocol):
    """Attributes of a `torch.nn.Parameter` that are read here."""

    @property
    def requires_grad(self) -> bool:
        """True if it is trained."""


class TorchModule(Protocol):
    """Methods of a `torch.nn.Module` that are called here; a recording has them too and needs no torch."""

    def state_dict(self) -> Mapping[str, Any]:
        """Tensors by name."""

    def get_submodule(self, path: str, /) -> Any:
        """The module at a path; only its type is used."""

    def named_parameters(self, *, remove_duplicate: bool = True) -> Iterable[tuple[str, Parameter]]:
        """Parameters by name; a tied one under each of its names if remove_duplicate is False."""


@runtime_checkable
class Weights(Protocol):
    """Conversion between a PyTorch module's tensors and the arrays of a Flax model."""

    def load(self, model: Any, state_dict: Mapping[str, Any]) -> Any:
        """A new model, in evaluation mode, with the tensors; raises ConversionError if they do not fit."""

    @property
    def notes(self) -> Sequence[str]:
        """Notes on what is not carried or not compared, a sentence each."""

    @property
    def uncompared(self) -> frozenset[str]:
        """PyTorch names whose gradients are not compared, and that no training step changes."""

    @property
    def untrained(self) -> frozenset[str]:
        """Further PyTorch names that no training step changes: a step on one side is not the same step on the other."""

    def read(self, state: Any, prefix: Path = (), *, gradients: bool = False) -> dict[str, np.ndarray]:
        """Arrays of a model, a State or gradients by PyTorch's name; prefix: path of the state in the model."""

    def held(self, state: Any, frozen: Sequence[str]) -> set[Path]:
        """The paths of arrays whose PyTorch names all match a pattern."""

    def module(self, path: str) -> str | None:
        """The Flax path of a PyTorch sub-module; None if it has no counterpart."""

    def carries(self, key: str) -> bool:
        """True if a tensor of the state_dict has a place in the Flax model."""


def aliases(torch_module: TorchModule) -> dict[str, str]:
    """Every name of every parameter, with the first of its names: tied weights have several."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in torch_module.named_parameters(remove_duplicate=False)
    }


def submodule(module: TorchModule, path: str) -> Any:
    """The module at a path; TorchScript's modules have no `get_submodule`. Raises KeyError if there is none."""
    try:
        return module.get_submodule(path)
    except RuntimeError:
        return dict(getattr(module, "named_modules")())[path]  # noqa: B009
