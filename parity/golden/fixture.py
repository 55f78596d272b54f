"""Golden fixtures: PyTorch's results in two files, to check Flax on machines without torch.

    STEM.safetensors   "state/…"                              the weights, in the module's own dtypes
                       "inputs/…", "labels", "targets/…"      arguments of the call, and of the loss
                       "output/…", "parameter gradients/…", "input gradients/…"      the results, in float64
    STEM.json          {"format": 3, "sha256": of STEM.safetensors, "name": …, and the fields below}

"readings" are the kinds of results that the fixture holds; recordings without it hold those that "noise" lists.
"noise" is the rounding noise of these results in float64, and "own values" are PyTorch's values in float32 in units of
float32's, by kind and tensor; see `parity.compare.noise`. "constants" says how far the results move with each constant
that the module holds in a narrow float: a tensor that may have no counterpart in Flax. "model" is the name and the
configuration from which `jaxmodels.models.build` builds the Flax model; null for a class that is not registered.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.io.atomic import atomic_file, check_file
from jaxmodels.io.bounded import is_integer, read_object, sha256_of
from jaxmodels.io.formats.safetensors import read_file, write_file
from jaxmodels.process.texts import quoted, shortened
from parity.compare.inputs import Inputs
from parity.compare.loss import Kinds
from parity.compare.noise import Noise
from parity.golden.contents import GROUPS, KINDS, check_constants, check_noises, check_readings, check_results

FORMAT = 3  # older ones do not bind the tensors to the JSON
FIELDS = {"format", "name", "model", "positional", "zero gradients", "untrained", "torch"}  # of every format
TENSOR_BYTES, HEADER_BYTES = 2**32, 2**27  # of a fixture's tensors, all of which are read, and of their names
LONGEST = 400  # characters of a reason
LONGEST_NAME = 1_000  # characters of a name, of which modules are searched for each word
MOST_PATTERNS = 100  # of zero gradients, each of which is compared with each parameter
LONGEST_PATTERNS = 10_000  # characters of all of them
SHIPPED = Path(__file__).parent / "fixtures"


@dataclasses.dataclass(frozen=True)
class RecordedParameter:
    """A parameter of the recorded module; a tied one is the same object under all its names."""

    requires_grad: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixture:
    """One recording; it has the methods of `weights.TorchModule`, so that it can replace the PyTorch module.

    model: {"model": name, "config": {…}}. results: by kind, by PyTorch's name. layers: types of the modules that own
    the weights, by path. names: each parameter name, with the first name of the same parameter. constants: by name, how
    far the results move, in units of the noise, by kind and tensor. torch: its version.
    """

    name: str
    model: dict[str, Any] | None
    inputs: Inputs
    labels: np.ndarray | None
    targets: dict[str, np.ndarray]
    state: dict[str, np.ndarray]
    results: Kinds
    noises: dict[str, dict[str, Noise]]
    own_values: dict[str, dict[str, float]]
    constants: dict[str, dict[str, dict[str, float]]]
    zero_gradients: tuple[str, ...]
    untrained: tuple[str, ...]
    layers: dict[str, str]
    names: dict[str, str]
    torch: str

    @property
    def nbytes(self) -> int:
        """Bytes of its weights, inputs and results."""
        groups = (self.state, self.inputs.named(), *self.results.values())
        return sum(array.nbytes for arrays in groups for array in arrays.values())

    def state_dict(self) -> dict[str, np.ndarray]:
        """The weights."""
        return self.state

    def get_submodule(self, path: str, /) -> Any:
        """An object whose type has the name of the module's type."""
        return type(self.layers[path], (), {})()

    def named_parameters(self, *, remove_duplicate: bool = True) -> Iterable[tuple[str, RecordedParameter]]:
        """Parameters by name; a tied one under each of its names if remove_duplicate is False."""
        untrained = set(self.untrained)
        first = {name: RecordedParameter(name not in untrained) for name in self.names.values()}
        return [(n, first[m]) for n, m in self.names.items() if not remove_duplicate or n == m]


def files_of(stem: str | os.PathLike) -> tuple[Path, Path]:
    """STEM.safetensors and STEM.json. A stem may contain dots; it may also be the name of either file."""
    if not isinstance(stem, str | os.PathLike):
        raise ValueError(f"stem={type(stem).__name__} must be a path")
    stem = Path(stem)
    if stem.suffix in (".safetensors", ".json"):
        stem = stem.with_suffix("")
    return stem.with_name(f"{stem.name}.safetensors"), stem.with_name(f"{stem.name}.json")


def write(stem: str | os.PathLike, tensors: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Replace both files, if `check_target` allows it. A process that is killed leaves the old fixture or the new one.

    The new JSON is on disk beside the old one before the tensors are replaced; `recover` finds it there.
    """
    check_target(stem)
    tensors_file, about_file = files_of(stem)
    bound: dict[str, Any] = {"format": FORMAT, "sha256": ""}

    def write_about() -> None:
        with atomic_file(pending(about_file)) as temporary_about:
            temporary_about.write_text(json.dumps(bound, indent=2) + "\n", encoding="utf-8")

    with atomic_file(tensors_file, write_about) as temporary_tensors:
        contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}  # of no axis too
        write_file(temporary_tensors, contiguous)
        bound |= {"sha256": sha256_of(temporary_tensors), **about}
    pending(about_file).replace(about_file)


def pending(about_file: Path) -> Path:
    """Name of a JSON whose tensors are not in place yet."""
    return about_file.with_name(f".{about_file.name}.new")


def recover(stem: str | os.PathLike) -> None:
    """Give a JSON its name whose tensors are in place: the last step of `write`, which a killed process has not done.

    Without effect on any other file, such as one of others in the place of any of the three, and in a folder that
    cannot be written.
    """
    tensors_file, about_file = files_of(stem)
    new = pending(about_file)
    with contextlib.suppress(OSError, ValueError):  # there is none, or another process has renamed it
        if new.is_symlink() or not describes_recording(new) or not holds_recording(tensors_file):
            return
        if os.path.lexists(about_file) and not describes_recording(about_file):
            return
        if read_object(new)["sha256"] == sha256_of(tensors_file, TENSOR_BYTES + HEADER_BYTES):
            new.replace(about_file)


def check_target(stem: str | os.PathLike) -> None:
    """Raise ValueError, naming the file, if one that would be replaced is of no fixture, such as a model's weights.

    A recording that a killed process had nearly written is recovered first.
    """
    recover(stem)
    tensors_file, about_file = files_of(stem)
    kinds = {tensors_file: holds_recording, about_file: describes_recording, pending(about_file): describes_recording}
    for file, is_ours in kinds.items():
        check_file(file)
        linked = file.is_symlink() and file not in (tensors_file, about_file)  # a name that no user has given
        if (file.exists() and not is_ours(file)) or linked:
            raise ValueError(
                f"stem={stem}: {file} was not written by parity.record; delete it yourself, or choose another stem"
            )


def holds_recording(file: Path) -> bool:
    """True for the tensors of a fixture of any format."""
    try:
        groups = {name.partition("/")[0] for name in read_file(file)}
    except (OSError, ValueError):
        return False
    return {"inputs", "output"} <= groups <= set(GROUPS)


def describes_recording(file: Path) -> bool:
    """True for the JSON of a fixture of any format."""
    try:
        return read_object(file).keys() >= FIELDS
    except (OSError, ValueError):
        return False


def read(stem: str | os.PathLike) -> Fixture:
    """Read a recording.

    Raises ValueError, naming the file, if one is missing, damaged or of another format, or if the tensors are not those
    of the JSON. A recording that a killed process had nearly written is recovered first.
    """
    recover(stem)
    tensors_file, about_file = files_of(stem)
    if missing := [str(file) for file in (about_file, tensors_file) if not file.exists()]:
        raise ValueError(f"stem={stem} is not a fixture: {' and '.join(missing)} does not exist")
    try:
        about = read_object(about_file)
        if not is_integer(about["format"], FORMAT):
            raise ValueError(
                f"format={quoted(about['format'])} must be {FORMAT}; record it again, with parity.record or "
                "parity --record FOLDER"
            )
        if sha256_of(tensors_file, TENSOR_BYTES + HEADER_BYTES) != about["sha256"]:
            raise ValueError(f"{tensors_file.name} has another sha256 than {about_file.name}: it is damaged or another")
        return fixture_of(about, read_file(tensors_file))
    except KeyError as error:
        reason = f"it has no {quoted(error.args[0])}"
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        reason = shortened(str(error), LONGEST)
    raise ValueError(f"stem={about_file.with_suffix('')} is not a fixture written by parity.record: {reason}")


def fixture_of(about: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Fixture:
    """Fixture from the content of its files; raises ValueError, KeyError or TypeError if a field is not as written.

    All that is checked of a fixture is checked here: `record` calls it before it writes.
    """
    if (size := sum(tensor.nbytes for tensor in tensors.values())) > TENSOR_BYTES:
        raise ValueError(f"its tensors have {size:,} bytes; at most {TENSOR_BYTES:,}")
    groups: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        check_length(key, "tensors")
        kind, _, name = key.partition("/")
        groups.setdefault(kind, {})[name] = tensor
    named = groups["inputs"]
    positional = [f"input {i}" for i in range(number_of(about, "positional", len(named)))]
    args = tuple(named.pop(name) for name in positional)
    model = about["model"]
    if model is not None and not (
        isinstance(model, dict) and isinstance(model.get("model"), str) and isinstance(model.get("config"), dict)
    ):
        raise ValueError(f"model={quoted(model)} must be null or an object of model, a name, and config, an object")
    results = {kind: groups[kind] for kind in KINDS if kind in groups}
    noises = {kind: {n: Noise(*pair) for n, pair in of.items()} for kind, of in numbers_of(about, "noise", 2).items()}
    own = values_of(about, "own values")
    check_readings(about.get("readings", list(noises)), tensors, {"noise": noises, "own values": own})
    check_noises(results, noises, own)
    constants = constants_of(about)
    check_constants(constants, results, noises)
    state, layers = groups.get("state", {}), texts_of(about, "layers", dict)
    if without := sorted({name.rpartition(".")[0] for name in state} - layers.keys()):
        raise ValueError(f"layers lacks {quoted(without[0])}, which owns tensors")
    names, untrained = texts_of(about, "names", dict), tuple(texts_of(about, "untrained", list))
    if unknown := sorted({*names.values(), *untrained} - names.keys()):
        raise ValueError(f"names lacks {quoted(unknown[0])}")
    zero_gradients = tuple(texts_of(about, "zero gradients", list))
    check_patterns(zero_gradients)
    if zero_gradients and "parameter gradients" not in results:
        raise ValueError(f"zero gradients={quoted(zero_gradients)} must be empty: it holds no parameter gradients")
    inputs, labels = Inputs(args, named), groups["labels"][""] if "labels" in groups else None
    targets = groups.get("targets") or {name: np.zeros(()) for name in groups["output"]}
    check_results(results, state, inputs.named(), labels, targets, set(names.values()) - set(untrained))
    return Fixture(
        name=text_of(about, "name"),
        model=model,
        inputs=inputs,
        labels=labels,
        targets=targets,
        state=state,
        results=results,
        noises=noises,
        own_values=own,
        constants=constants,
        zero_gradients=zero_gradients,
        untrained=untrained,
        layers=layers,
        names=names,
        torch=text_of(about, "torch"),
    )


def check_patterns(zero_gradients: Sequence[str]) -> None:
    """Raises ValueError for more zero gradients, or more characters of them, than a fixture has."""
    if len(zero_gradients) > MOST_PATTERNS:
        raise ValueError(f"zero gradients has {len(zero_gradients):,} patterns; at most {MOST_PATTERNS}")
    if (length := sum(map(len, zero_gradients))) > LONGEST_PATTERNS:
        raise ValueError(f"zero gradients has {length:,} characters; at most {LONGEST_PATTERNS:,}")


def check_length(text: str, field: str) -> None:
    """Raises ValueError if a name, or another text of a fixture, is longer than any that is recorded."""
    if len(text) > LONGEST_NAME:
        raise ValueError(f"{field}: {quoted(text)} has {len(text):,} characters; at most {LONGEST_NAME:,}")


def text_of(about: Mapping[str, Any], field: str) -> str:
    """Field that is a string."""
    if not isinstance(about[field], str):
        raise ValueError(f"{field}={quoted(about[field])} must be a string")
    check_length(about[field], field)
    return str(about[field])


def texts_of(about: Mapping[str, Any], field: str, kind: type) -> Any:
    """Field that is a list or an object of strings: names, also of types, which hold no character 0."""
    value = about[field]
    held = (*value.values(), *value) if isinstance(value, dict) else value
    if not isinstance(value, kind) or not all(isinstance(text, str) and text.isprintable() for text in held):
        of = f"{'an object' if kind is dict else 'a list'} of strings of printable characters"
        raise ValueError(f"{field}={quoted(value)} must be {of}")
    for text in held:
        check_length(text, field)
    return value


def number_of(about: Mapping[str, Any], field: str, most: int) -> int:
    """Field that is an integer from 0 to `most`."""
    value = about[field]
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{field}={quoted(value)} must be an integer from 0 to {most}")
    return value


def numbers_of(about: Mapping[str, Any], field: str, length: int) -> dict[str, dict[str, list[float]]]:
    """Field with `length` numbers for each kind of results and each tensor."""
    found: dict[str, dict[str, list[float]]] = {}
    for kind, tensors in about[field].items():
        for name, value in tensors.items():
            numbers = value if isinstance(value, list) else [value]
            if len(numbers) != length or not all(type(number) in (int, float) and number >= 0 for number in numbers):
                must = f"must be {length} numbers that are not negative"
                raise ValueError(f"{field} of {quoted(f'{kind}/{name}')} is {quoted(value)}, {must}")
            found.setdefault(kind, {})[name] = [float(number) for number in numbers]
    return found


def values_of(about: Mapping[str, Any], field: str) -> dict[str, dict[str, float]]:
    """Field with a number for each kind of results and each tensor."""
    found = numbers_of(about, field, 1)
    return {kind: {name: value for name, (value,) in of_kind.items()} for kind, of_kind in found.items()}


def constants_of(about: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Field "constants"; older recordings have none."""
    moves = about.get("constants", {})
    if not isinstance(moves, dict):
        raise ValueError(f"constants={quoted(moves)} must be an object")
    texts_of({"constants": list(moves)}, "constants", list)
    return {constant: values_of(moves, constant) for constant in moves}


def stems(folder: str | os.PathLike) -> list[Path]:
    """JSON files of the fixtures of a folder, sorted; raises ValueError if there are none.

    Those of which a file is missing, or is none to be read, are among them: `read` says what is wrong.
    """
    kinds = {".safetensors": holds_recording, ".json": describes_recording}
    found = set()
    for file in Path(folder).glob("[!.]*"):
        if file.suffix in kinds:
            tensors, about = files_of(file)
            if (os.path.lexists(tensors) and os.path.lexists(about)) or kinds[file.suffix](file):
                found.add(about)
    if not found:
        raise ValueError(f"folder {folder} contains no fixture; it must contain STEM.json and STEM.safetensors")
    return sorted(found)
