"""Golden fixtures: what PyTorch computed, in two files, for machines where there is no torch.

    STEM.safetensors   "state/…"                              the weights, in the module's own dtypes
                       "inputs/…", "labels", "targets/…"      what goes in, and what the loss compares with
                       "output/…", "parameter gradients/…", "input gradients/…"      the truth, in float64
    STEM.json          {"format": 1, "name": …, and what else is said of them}

"own errors" are PyTorch's errors in float32 against the truth, by kind and tensor: the yardstick travels with it.
"model" is what `jaxmodels.models.build` makes the Flax model of, null where it is somebody's own.
"""

import dataclasses
import importlib.metadata
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.io.safetensors import read_file, write_file
from jaxmodels.models import build, describe, name_of
from jaxmodels.weights.names import as_numpy
from parity.compare.adapters import as_module
from parity.compare.inputs import Inputs, matches, random_targets
from parity.compare.jax_side import FlaxSide, strict_precision
from parity.compare.names import Names, Twins, aliases, weights_of
from parity.measure import limits
from parity.report.report import Report
from parity.report.results import Check
from parity.report.stamp import environment

FORMAT = 1
KINDS = ("output", "parameter gradients", "input gradients")
SHIPPED = Path(__file__).parent / "fixtures"

Kinds = Mapping[str, Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Fixture:
    """One recording; `truth` by kind, each tensor under its PyTorch name."""

    name: str
    model: dict[str, Any] | None  # {"model": class, "config": {…}}, as config.json has it
    inputs: Inputs
    labels: np.ndarray | None
    targets: dict[str, np.ndarray]
    state: dict[str, np.ndarray]
    truth: dict[str, dict[str, np.ndarray]]
    own_errors: dict[str, dict[str, float]]
    zero_gradients: tuple[str, ...]
    untrained: tuple[str, ...]
    layers: dict[str, str]  # the types of the modules that own the weights, by path
    names: dict[str, str]  # of every parameter, and the first of those it has
    torch: str  # its version

    def state_dict(self) -> dict[str, np.ndarray]:
        """With the next two, what `parity.compare.names` asks of a PyTorch module."""
        return self.state

    def get_submodule(self, path: str) -> Any:
        return type(self.layers[path], (), {})()

    def named_parameters(self, remove_duplicate: bool = True) -> Iterator[tuple[str, Any]]:
        names = (item for item in self.names.items() if not remove_duplicate or item[0] == item[1])
        return ((name, self.state[first]) for name, first in names)


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
    """Writes STEM.safetensors and STEM.json: a module's weights, inputs, outputs and gradients, computed in float64.

    inputs, labels, zero_gradients and randomize are those of `parity.check`. With a flax_module of this project (one
    that `jaxmodels.save` would take) the fixture says how to build it. Needs torch. Raises ValueError where the inputs
    are no arrays, or the folder is not there.
    """
    import torch

    from parity.compare import torch_side

    files = files_of(stem)
    if not files[0].parent.is_dir():
        raise ValueError(f"{stem} cannot be written: there is no folder {files[0].parent}")
    model = description(flax_module)
    inputs, labels = Inputs.of(inputs), None if labels is None else np.asarray(labels)
    module = torch_side.randomized(torch_module, seed) if randomize else torch_module
    with torch_side.strict_precision():
        side = torch_side.TorchSide(module, torch.float64, "cpu")
        targets = {} if labels is not None else random_targets(side.outputs(inputs), seed)
        truth = side.evaluate(inputs, labels, targets)
        own = torch_side.TorchSide(module, torch.float32, "cpu").evaluate(inputs, labels, targets)
    tensors = {f"state/{key}": as_numpy(tensor) for key, tensor in module.state_dict().items()}
    tensors |= {f"inputs/{key}": value for key, value in inputs.named().items()}
    tensors |= {} if labels is None else {"labels": labels}
    tensors |= {f"targets/{key}": target for key, target in targets.items()}
    tensors |= {f"{kind}/{key}": array for kind, group in truth.items() for key, array in group.items()}
    about = {
        "format": FORMAT,
        "name": name or files[0].stem,
        "model": model,
        "positional": len(inputs.args),
        "zero gradients": list(zero_gradients),
        "untrained": [key for key, parameter in module.named_parameters() if not parameter.requires_grad],
        "own errors": {kind: limits.errors(own[kind], truth[kind]) for kind in truth},
        "layers": {path: type(module.get_submodule(path)).__name__ for path in owners(module.state_dict())},
        "names": aliases(module),
        "torch": importlib.metadata.version("torch"),
    }
    write_both(files, tensors, json.dumps(about, indent=2) + "\n")


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


def files_of(stem: str | os.PathLike) -> tuple[Path, Path]:
    """The tensors and what is said of them. A name may hold dots, and may be that of either file."""
    stem = Path(stem)
    if stem.suffix in (".safetensors", ".json"):
        stem = stem.with_suffix("")
    return stem.with_name(f"{stem.name}.safetensors"), stem.with_name(f"{stem.name}.json")


def write_both(files: tuple[Path, Path], tensors: Mapping[str, np.ndarray], about: str) -> None:
    """Beside first, then in place: the JSON last, because without it there is no fixture."""
    beside = [file.with_name(f".{file.name}.writing") for file in files]
    try:
        for file in beside:
            file.unlink(missing_ok=True)
        write_file(beside[0], {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
        beside[1].write_text(about, encoding="utf-8")
        for written, file in zip(beside, files, strict=True):
            written.replace(file)
    finally:
        for file in beside:
            file.unlink(missing_ok=True)


def read(stem: str | os.PathLike) -> Fixture:
    """A recording; raises ValueError that names the file where one is missing, damaged or of another format."""
    tensors_file, about_file = files_of(stem)
    try:
        about = json.loads(about_file.read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']}, this version reads {FORMAT}")
        groups: dict[str, dict[str, np.ndarray]] = {}
        for key, tensor in read_file(tensors_file).items():
            kind, _, name = key.partition("/")
            groups.setdefault(kind, {})[name] = np.array(tensor)
        named = groups["inputs"]
        args = tuple(named.pop(f"input {i}") for i in range(about["positional"]))
        return Fixture(
            about["name"],
            about["model"],
            Inputs(args, named),
            groups["labels"][""] if "labels" in groups else None,
            groups.get("targets") or {name: np.zeros(()) for name in groups["output"]},
            groups.get("state", {}),
            {kind: groups[kind] for kind in KINDS if kind in groups},
            about["own errors"],
            tuple(about["zero gradients"]),
            tuple(about["untrained"]),
            about["layers"],
            about["names"],
            about["torch"],
        )
    except FileNotFoundError:
        raise ValueError(f"{about_file} does not exist: {stem} is no fixture") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{about_file.with_suffix('')} is no fixture that parity.record wrote: {error}") from error


def stems(folder: str | os.PathLike) -> list[Path]:
    """The fixtures of a folder, sorted; raises ValueError where there are none."""
    found = sorted(file for file in Path(folder).glob("*.json") if files_of(file)[0].is_file())
    if not found:
        raise ValueError(f"{folder} holds no fixtures (STEM.json beside STEM.safetensors)")
    return found


def rebuilt(fixture: Fixture) -> Any:
    """The abstract Flax model that a fixture of this project describes; raises ValueError for somebody's own."""
    if fixture.model is None:
        raise ValueError(f"{fixture.name} does not say how its Flax model is built: pass one to parity.replay")
    about = fixture.model
    return nnx.eval_shape(lambda: build(about["model"], about["config"]))


def replay(
    flax_module: Any,
    stem: str | os.PathLike,
    *,
    names: Names | None = None,
    channels_last: Sequence[str] = (),
    device: str | None = None,
    float64: bool | None = None,
) -> Report:
    """Judges a Flax module, whose arrays may be abstract, by what `record` wrote. Needs no torch.

    flax_module None: the one that the fixture describes. The other arguments are those of `parity.check`, and the
    `Report` has its readings but for training and where they part: outputs and gradients in float64, the same in
    float32 in units of PyTorch's recorded errors, cached decoding, and the weights' way to PyTorch and back. Raises
    ValueError where the fixture is damaged, and ConversionError where its weights do not fit.
    """
    began = time.perf_counter()
    fixture = read(stem)
    model = rebuilt(fixture) if flax_module is None else as_module(flax_module, fixture.inputs, channels_last)
    chosen = jax.devices(device)[0]
    float64 = chosen.platform != "tpu" if float64 is None else float64
    with strict_precision(float64, chosen):
        checks = list(Replay(fixture, model, names, channels_last).checks(float64))
    stamp = environment(chosen, float64, seed=None) | {"torch": f"{fixture.torch}, recorded"}
    passed = all(check.passed for check in checks)
    skipped = (
        {} if passed else {"where they part": "a fixture holds no activations; parity.check tells, where torch is"}
    )
    return Report(fixture.name, checks, time.perf_counter() - began, stamp, skipped=skipped)


class Replay:
    """The readings of one fixture."""

    def __init__(self, fixture: Fixture, model: Any, names: Names | None, channels_last: Sequence[str]):
        self.fixture, self.model, self.channels_last = fixture, model, channels_last
        self.weights = weights_of(fixture, model, names)

    def checks(self, float64: bool) -> Iterator[Check]:
        fixture = self.fixture
        yield Check("round trip", "bits", *limits.worst(self.changed() or {"": 0.0}), 0.0)
        for dtype in (jnp.float64, jnp.float32) if float64 else (jnp.float32,):
            precision = jnp.dtype(dtype).name
            side, result = self.evaluated(dtype)
            exact = precision == "float64"
            limit = limits.FLOAT64_LIMIT if exact else limits.RATIO_LIMIT
            for kind, truth in fixture.truth.items():
                errors = limits.errors(self.trained(result.get(kind, {})), truth)
                values = errors if exact else limits.in_units_of(errors, fixture.own_errors[kind])
                yield Check(kind, precision, *limits.worst(values), limit)
            if exact and fixture.zero_gradients:
                yield Check("zero gradients", precision, *limits.worst(self.declared(result)), limit)
            if (exact or not float64) and hasattr(self.model, "prefill"):
                errors = self.decoded(side)
                values = errors if exact else limits.in_units_of(errors, fixture.own_errors["output"])
                yield Check("cached decoding", precision, *limits.worst(values), limit)

    def evaluated(self, dtype: Any) -> tuple[FlaxSide, dict[str, dict[str, np.ndarray]]]:
        state = {n: a.astype(dtype) if a.dtype.kind not in "iub" else a for n, a in self.fixture.state.items()}
        side = FlaxSide(self.model, state, self.fixture.inputs, dtype, self.weights, self.channels_last)
        return side, side.evaluate(self.fixture.inputs, self.fixture.labels, self.fixture.targets)

    def trained(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Without the gradients of parameters that PyTorch does not train."""
        return {name: tensor for name, tensor in tensors.items() if name not in self.fixture.untrained}

    def declared(self, result: Kinds) -> dict[str, float]:
        """Gradients declared to be zero, on both sides, in units of the largest."""
        truth = self.fixture.truth["parameter gradients"]
        both = {f"torch {name}": gradient for name, gradient in truth.items()} | dict(result["parameter gradients"])
        zero = {n: g for n, g in both.items() if matches(n.removeprefix("torch "), self.fixture.zero_gradients)}
        return {name: float(np.abs(gradient).max()) / limits.scale_of(truth) for name, gradient in zero.items()}

    def decoded(self, side: FlaxSide) -> dict[str, float]:
        """Errors of the logits through the cache, against the recorded full forward pass."""
        ids, *_ = self.fixture.inputs.named().values()
        first, logits = side.decode(ids, **self.fixture.inputs.for_decoding())
        (name, truth), axis = next(iter(self.fixture.truth["output"].items())), side.module.sequence_axis
        return limits.errors({name: logits}, {name: truth.take(np.arange(first, ids.shape[axis]), axis)})

    def changed(self) -> dict[str, float]:
        """1 for every tensor that comes back from Flax with another bit."""
        with jax.enable_x64(True):
            back = self.weights.read(nnx.state(self.weights.load(self.model, self.fixture.state)))
        carried = self.fixture.state if isinstance(self.weights, Twins) else back
        return {name: float(bits(self.fixture.state[name]) != bits(back.get(name))) for name in carried}


def bits(array: np.ndarray | None) -> tuple | None:
    return None if array is None else (array.shape, array.dtype, array.tobytes())
