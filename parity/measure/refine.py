"""Measure the noise of tensors again whose values are larger than those of correct ports, but not by much.

Four runs underestimate the noise of a tensor of few elements, such as the gradient of a scalar, and moving parameters
and inputs alone underestimates that of a long sum whose terms cancel. In the second measurement every operation's
result is moved, over more runs. A mistake remains one: it is larger than any rounding.
"""

from collections.abc import Callable, Mapping

from parity.compare.noise import LIMIT, PREDICTED, ULPS
from parity.compare.sides.torch_side import TorchSide
from parity.measure.reference import Reference, Values, narrow_limits

RUNS = 16
DOUBTFUL = 32.0  # × its limit: a value beyond this is no rounding

Doubtful = dict[str, list[str]]


def doubtful(wide: Values, narrow: Values, own: Values) -> Doubtful:
    """The tensors, by kind, that exceed `PREDICTED` in float64 or the limit in float32, by at most `DOUBTFUL`."""
    found: dict[str, dict[str, None]] = {}
    for kind, of_kind in wide.items():
        over = {name for name, value in of_kind.items() if PREDICTED < value <= DOUBTFUL * LIMIT}
        found.setdefault(kind, {}).update(dict.fromkeys(sorted(over)))
    for kind, of_kind in narrow.items():
        limits = narrow_limits(of_kind, own[kind])
        over = {name for name, value in of_kind.items() if limits[name] < value <= DOUBTFUL * limits[name]}
        found.setdefault(kind, {}).update(dict.fromkeys(sorted(over)))
    return {kind: list(names) for kind, names in found.items() if names}


def refined(reference: Reference, side: Callable[[], TorchSide], tensors: Mapping[str, list[str]]) -> Reference:
    """The reference with the noise of these tensors, by kind, measured again. side: gives PyTorch's in float64."""
    again = side().noises(
        reference.batch,
        reference.kinds,
        ULPS[reference.measured],
        reference.comparison.seed,
        runs=RUNS,
        operations=True,
    )
    return reference.with_noises({kind: {name: again[kind][name] for name in names} for kind, names in tensors.items()})


def rescaled(values: Values, before: Reference, after: Reference) -> Values:
    """Values in units of one reference's noise, in those of the other."""
    return {
        kind: {name: value * ratio(before, after, kind, name) for name, value in of_kind.items()}
        for kind, of_kind in values.items()
    }


def ratio(before: Reference, after: Reference, kind: str, name: str) -> float:
    """Ratio of the units of a tensor's noise; 1 if it has none."""
    if name not in before.noises.get(kind, {}) or not after.noises[kind][name].unit:
        return 1.0
    return before.noises[kind][name].unit / after.noises[kind][name].unit
