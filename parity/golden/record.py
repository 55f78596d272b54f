"""`record`: write a golden fixture of a PyTorch module. Needs torch."""

import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmodels.io.bounded import errors_naming
from jaxmodels.models import describe, name_of
from jaxmodels.weights.names import as_numpy
from parity.compare.comparison import Comparison
from parity.compare.noise import ULPS
from parity.compare.sides.torch_side import TorchSide
from parity.compare.weights import aliases
from parity.golden.contents import zero_gradients
from parity.golden.fixture import check_length, check_patterns, check_target, files_of, fixture_of, write
from parity.measure.explain import Changes, moves_by
from parity.measure.reference import Reference

AVERAGES = ("running_mean", "running_var")


def record(
    torch_module: Any,
    inputs: Any,
    stem: str | os.PathLike,
    *,
    flax_module: Any = None,
    labels: Any = None,
    zero_gradients: Sequence[str] = (),
    randomize: bool = True,
    seed: int = 0,
    name: str = "",
) -> None:
    """Write STEM.safetensors and STEM.json: a module's weights, inputs, outputs and gradients, computed in float64.

    inputs, labels, zero_gradients and randomize are those of `parity.check`. If flax_module has a registered class
    (one that `jaxmodels.save` takes), the fixture describes how to build it. Raises ValueError for inputs that are not
    arrays, if the folder does not exist, for a fixture that `read` would refuse, as one whose noise in float32 is as
    large as the results, and if one of both files exists that is not of a fixture.
    """
    folder = files_of(stem)[0].parent
    if not folder.is_dir():
        raise ValueError(f"stem={stem}: folder {folder} does not exist")
    if torch_module is None:
        raise ValueError("torch_module=None must be a torch.nn.Module")
    check_target(stem)
    model = description(flax_module)
    comparison = Comparison.of(
        torch_module,
        None,
        inputs,
        labels=labels,
        zero_gradients=zero_gradients,
        device="cpu",
        randomize=randomize,
        seed=seed,
    )
    write_recording(comparison, stem, name=name, model=model)


def write_recording(
    comparison: Comparison, stem: str | os.PathLike, *, name: str = "", model: dict[str, Any] | None = None
) -> None:
    """`record` on a resolved comparison; model: how to build the Flax model."""
    module = comparison.torch
    assert module is not None, "only a PyTorch module can be recorded"
    with errors_naming(stem):
        check_length(name, "name")
        check_patterns(comparison.zero_gradients)
    given = comparison.inputs
    others = [name for name, tree in given.items().items() if tree is not None and not isinstance(tree, np.ndarray)]
    if others := [*others, *given.torch_kwargs]:
        raise ValueError(f"inputs: got {', '.join(others)}; a fixture holds arrays alone, by position or by name")
    with comparison.strict_precision():
        side = comparison.torch_side("float64")
        batch, results = comparison.evaluated(side)
        while zero := zero_gradients(results):
            results = {kind: tensors for kind, tensors in results.items() if kind != zero}
        noises = side.noises(batch, results, ULPS["float64"], comparison.seed)
        reference = Reference(comparison, batch, results, noises)
        own = reference.values(comparison.torch_side("float32").evaluate(batch), "float32")
        state = {key: as_numpy(tensor) for key, tensor in module.state_dict().items()}
        targets = batch.targets if batch.labels is None else {}
        constants = moves_by_constants(reference, side)
    groups: dict[str, Mapping[str, Any]] = {
        "state": state,
        "inputs": batch.inputs.named(),
        "targets": targets,
        **results,
    }
    tensors = {f"{group}/{key}": array for group, arrays in groups.items() for key, array in arrays.items()}
    tensors |= {} if batch.labels is None else {"labels": batch.labels}
    about = {
        "name": name or files_of(stem)[0].stem,
        "model": model,
        "positional": len(batch.inputs.args),
        "zero gradients": list(comparison.zero_gradients) if "parameter gradients" in results else [],
        "untrained": [key for key, parameter in module.named_parameters() if not parameter.requires_grad],
        "readings": list(results),
        "noise": {kind: {n: [one.unit, one.masks_from] for n, one in of.items()} for kind, of in noises.items()},
        "own values": own,
        "constants": constants,
        "layers": {path: type(module.get_submodule(path)).__name__ for path in owners(module.state_dict())},
        "names": aliases(module),
        "torch": importlib.metadata.version("torch"),
    }
    with errors_naming(stem):
        fixture_of(about, tensors)  # what `read` refuses is not recorded
    write(stem, tensors, about)


def moves_by_constants(reference: Reference, side: TorchSide) -> dict[str, dict[str, dict[str, float]]]:
    """How far the results move with each constant that the module holds in a narrow float, in units of the noise.

    These are all floating tensors that PyTorch does not train, but for BatchNorm's averages, which Flax has too.
    """
    found = {}
    for name, tensor in side.narrow_constants(lambda key: key.rpartition(".")[2] in AVERAGES).items():
        changes = Changes()
        for values in moves_by(reference, side, name, tensor):
            changes.add(values)
        found[name] = changes.largest
    return found


def owners(state_dict: Mapping[str, Any]) -> list[str]:
    """The paths of the modules that hold the tensors."""
    return sorted({key.rpartition(".")[0] for key in state_dict})


def description(flax_module: Any) -> dict[str, Any] | None:
    """Name and configuration that rebuild the module; None if its class is not registered with `jaxmodels`."""
    try:
        name_of(flax_module)
    except ValueError:
        return None
    return {key: value for key, value in json.loads(describe(flax_module)).items() if key != "format"}
