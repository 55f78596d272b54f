"""Checks of a fixture's content that need no model: which arrays belong together, and how large noise may be."""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmodels.process.texts import quoted
from parity.compare.loss import Kinds, check_labels, masks
from parity.compare.noise import HUGE, LIMIT, OWN, ULPS, Noise, blocks, check_counted, counted
from parity.compare.outputs import joined, words

KINDS = ("output", "parameter gradients", "input gradients")
GROUPS = ("state", "inputs", "labels", "targets", *KINDS)
NARROW = ULPS["float32"] / ULPS["float64"]
# Of the largest result. A gradient that is zero by cancellation is all rounding: its own size is no measure of it.
CANCELLED = 2.0**-7
MOVED = 2.0**-7  # of a result: as far as the rounding of a narrow constant may move it


def check_readings(
    readings: Any, tensors: Iterable[str], listed: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> None:
    """Compare the kinds of results that a fixture states with its tensors, and with what it lists for each of them.

    readings: the kinds. listed: the fields "noise" and "own values". Raises ValueError for a kind or tensor
    that only one of them has, and for tensors of no known group.
    """
    known = isinstance(readings, list) and all(kind in KINDS for kind in readings)
    if not known or len(set(readings)) < len(readings) or KINDS[0] not in readings:
        raise ValueError(f"readings={quoted(readings)} must be a list of kinds: {KINDS[0]}, or more of {quoted(KINDS)}")
    results = set()
    for key in tensors:
        group = key.partition("/")[0]
        if group not in GROUPS:
            raise ValueError(f"tensor {quoted(key)} belongs to none of {', '.join(GROUPS)}")
        if group in KINDS:
            results.add(key)
    present = {key.partition("/")[0] for key in results}
    if missing := [kind for kind in KINDS if (kind in readings) != (kind in present)]:
        states, holds = ("states", "holds no") if missing[0] in readings else ("does not state", "holds")
        raise ValueError(f"it {states} the reading {quoted(missing[0])}, and {holds} tensors of it")
    for field, kinds in listed.items():
        named = {f"{kind}/{name}" for kind, of_kind in kinds.items() for name in of_kind}
        if lacking := sorted(results - named):
            raise ValueError(f"{field} lacks {quoted(lacking[0])}")
        if extra := sorted(named - results):
            raise ValueError(f"{field} has {quoted(extra[0])}, which is no tensor of the fixture")


def check_results(
    results: Kinds,
    state: Mapping[str, np.ndarray],
    inputs: Mapping[str, np.ndarray],
    labels: np.ndarray | None,
    targets: Mapping[str, np.ndarray],
    trained: Collection[str],
) -> None:
    """Compare names, shapes and dtypes of results with the weights, inputs, labels and targets that they follow from.

    trained: names of the parameters that have gradients. Raises ValueError, naming the tensor, if they do not fit, and
    for weights with NaN, results without a finite number, targets without a loss, gradients that are all zero and
    results that are.
    """
    for name, array in state.items():
        if jnp.issubdtype(array.dtype, jnp.inexact) and np.isnan(array).any():
            raise ValueError(f"{quoted(f'state/{name}')} has NaN, with which any model would agree")
    for name, array in (
        (f"{kind}/{name}", array) for kind, of_kind in results.items() for name, array in of_kind.items()
    ):
        if array.size and not counted(array):
            raise ValueError(f"{quoted(name)} has no finite number, so that nothing could be compared")
    check_counted(results["output"])
    for name in results["output"]:
        if joined(words(name)) != name:
            raise ValueError(f"{quoted(f'output/{name}')} is no name of an output, as output/output[0] is")
    if zero := zero_gradients(results):
        raise ValueError(f"{zero} are all zero, with which a module that passes none on would agree")
    if not any(array.any() for of_kind in results.values() for array in of_kind.values()):
        raise ValueError(
            f"{', '.join(results)}: all numbers are zero, with which a module without a result would agree"
        )
    for name, array in inputs.items():
        if not array.size or not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
            raise ValueError(f"inputs/{name} is {described(array)}; it must be a non-empty array of numbers")
    floating = {name: array for name, array in inputs.items() if jnp.issubdtype(array.dtype, jnp.inexact)}
    for kind, group, sources in (
        ("parameter gradients", "state", {name: state.get(name) for name in trained}),
        ("input gradients", "inputs", floating),
    ):
        if kind not in results:
            continue
        if differing := sorted(results[kind].keys() ^ sources.keys()):
            has = "has a gradient" if differing[0] in results[kind] else "has no gradient"
            raise ValueError(f"{quoted(f'{kind}/{differing[0]}')}: {quoted(f'{group}/{differing[0]}')} {has}")
        for name, gradient in results[kind].items():
            source = sources[name]
            if gradient.dtype not in (np.float64, np.complex128):
                raise ValueError(f"{quoted(f'{kind}/{name}')} is {described(gradient)}; it must be in float64")
            if source is None:
                continue
            alike = source.shape == gradient.shape and is_complex(source) == is_complex(gradient)
            if not alike or not jnp.issubdtype(source.dtype, jnp.inexact):
                raise ValueError(
                    f"{quoted(f'{kind}/{name}')} is {described(gradient)}; {group}/{name} is {described(source)}"
                )
    if labels is not None:
        if labels.dtype.kind not in "iu" or not labels.size:
            raise ValueError(f"labels is {described(labels)}; it must be a non-empty array of integers")
        check_labels(labels, results["output"])
        return
    if differing := sorted(results["output"].keys() ^ targets.keys()):
        raise ValueError(f"outputs and targets must have the same names; only one of them has {quoted(differing[0])}")
    for name, output in results["output"].items():
        if targets[name].shape != output.shape or not jnp.issubdtype(targets[name].dtype, jnp.inexact):
            raise ValueError(
                f"{quoted(f'targets/{name}')} is {described(targets[name])}; output/{name} is {described(output)}"
            )
        lost = int(np.count_nonzero(np.isnan(targets[name]) & ~masks(output)))
        if lost or np.isinf(targets[name]).any():
            raise ValueError(f"{quoted(f'targets/{name}')} has NaN for {lost:,} numbers of the output, or an infinity")


def zero_gradients(results: Kinds) -> str:
    """The kind of gradients that would say nothing of a port: the first one, if all of it is zero; else "".

    Those of parameters are the first. An input may have none, such as a mask that is only compared with 0.
    """
    kind = next((kind for kind in KINDS[1:] if kind in results), "")
    return kind if kind and not any(array.any() for array in results[kind].values()) else ""


def check_noises(
    results: Kinds, noises: Mapping[str, Mapping[str, Noise]], own: Mapping[str, Mapping[str, float]]
) -> None:
    """Compare the noise of results, and PyTorch's own values in float32, with the results' sizes.

    What passes as rounding in float32, at `LIMIT` or at twice the own value, must be smaller than the result. This is
    also the most that passes in float64 for any reason (`parity.measure.explain`). Raises ValueError, naming the field
    and the tensor, if more would pass, and for numbers that are negative or not finite.
    """
    sizes = sizes_of(results, noises)
    largest = max(sizes.values(), default=0.0)
    for (kind, name), size in sizes.items():
        unit, masks_from, value = noises[kind][name].unit, noises[kind][name].masks_from, own[kind][name]
        at = quoted(f"{kind}/{name}")
        if not (0 <= unit < math.inf and 0 <= masks_from <= HUGE):
            raise ValueError(
                f"noise of {at} is {[unit, masks_from]}, must be two finite numbers that are not negative, the second "
                f"at most {HUGE:g}"
            )
        if not 0 <= value < math.inf:
            raise ValueError(f"own values of {at} is {value}, must be finite and not negative")
        most = max(size, CANCELLED * largest) / NARROW
        if unit * LIMIT > most:
            raise ValueError(
                f"noise of {at} is {unit:.3g}, must be at most {most / LIMIT:.3g}: the largest element is {size:.3g}, "
                f"and {LIMIT:g} × noise in float32 would hide it"
            )
        if unit * OWN * value > most:
            raise ValueError(
                f"own values of {at} is {value:.3g}, must be at most {most / OWN / unit:.3g}: the largest element is "
                f"{size:.3g}, and {OWN:g} × this value in float32 would hide it"
            )


def check_constants(
    constants: Mapping[str, Mapping[str, Mapping[str, float]]],
    results: Kinds,
    noises: Mapping[str, Mapping[str, Noise]],
) -> None:
    """Compare how far results move with narrow constants, in units of the noise, with the results' names and sizes.

    A result may be off by as much in float64, but by no more than float32 costs (`parity.measure.explain`), beyond
    which one rounding of a constant in bfloat16 moves it. Raises ValueError, naming the constant, for a tensor that is
    no result, and if more than MOVED of a result would pass.
    """
    sizes = sizes_of(results, noises)
    largest = max(sizes.values(), default=0.0)
    for constant, kinds in constants.items():
        for kind, name, move in (
            (kind, name, move) for kind, of_kind in kinds.items() for name, move in of_kind.items()
        ):
            at = f"constants of {quoted(constant)} has {quoted(f'{kind}/{name}')}"
            if (kind, name) not in sizes:
                raise ValueError(f"{at}, which is no result of the fixture")
            most = MOVED * max(sizes[kind, name], CANCELLED * largest)
            if not noises[kind][name].unit * LIMIT * min(1 + move, NARROW) <= most:
                raise ValueError(f"{at} at {move:.3g} × noise, which would hide a difference of more than {most:.3g}")


def sizes_of(results: Kinds, noises: Mapping[str, Mapping[str, Noise]]) -> dict[tuple[str, str], float]:
    """`ordinary_size` of each result, by kind and name."""
    return {
        (kind, name): ordinary_size(tensor, noises[kind][name].masks_from)
        for kind, of_kind in results.items()
        for name, tensor in of_kind.items()
    }


def ordinary_size(tensor: np.ndarray, masks_from: float) -> float:
    """The largest magnitude of a tensor among elements that are compared in units of noise: no masks, no NaN."""
    largest = 0.0
    for (block,) in blocks(tensor):
        with np.errstate(over="ignore", invalid="ignore"):
            size = np.abs(block)
        largest = max(largest, float(np.max(size, initial=0.0, where=size < min(masks_from, HUGE))))
    return largest


def is_complex(array: Any) -> bool:
    """True for an array of complex numbers."""
    return bool(jnp.issubdtype(array.dtype, jnp.complexfloating))


def described(array: Any) -> str:
    """Dtype and shape, as in 'float64 [3, 5]'."""
    return f"{array.dtype} {list(array.shape)}"
