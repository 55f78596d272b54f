"""`replay`: check a Flax module against a golden fixture. Needs no torch."""

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from jaxmodels.io.bounded import errors_naming
from jaxmodels.models import abstract
from jaxmodels.weights.stored import Stored
from parity.compare.comparison import Comparison
from parity.compare.decoding import NotDecodable, decodes
from parity.compare.loss import Batch
from parity.compare.names import Names
from parity.compare.noise import LIMIT
from parity.golden.contents import KINDS
from parity.golden.fit import check_fit, naming
from parity.golden.fixture import Fixture, read
from parity.measure.explain import NAMED, Changes, Limits, explained
from parity.measure.reference import Reference, judged, judged_narrow, round_trip
from parity.report.report import Report
from parity.report.results import Check
from parity.report.stamp import environment

NO_TRACE = "a fixture holds no activations; parity.check locates the difference on a machine with torch"
ABSENT = "not in the fixture"


def replay(
    flax_module: Any,
    stem: str | os.PathLike,
    *,
    names: Names | None = None,
    channels_last: Sequence[str] = (),
    device: str | None = None,
    float64: bool | None = None,
) -> Report:
    """Compare a Flax module, whose arrays may be abstract, with a fixture written by `record`.

    If flax_module is None, the model that the fixture describes is built. The other arguments are those of
    `parity.check`. The `Report` has the readings of a check except training, and no first divergence: outputs and
    gradients in float64, the same in float32, both in units of the recorded noise, cached decoding, and the weights'
    round trip; kinds of results that the fixture does not hold are in `Report.skipped`. Raises ValueError if the
    fixture is damaged, or if one of its arrays has another name, shape or dtype than the module's, and ConversionError
    if its weights do not fit.
    """
    fixture = read(stem)
    if flax_module is None:
        with errors_naming(stem):
            flax_module = rebuilt(fixture)
    with naming(stem):
        comparison = Comparison.of(
            fixture,
            flax_module,
            fixture.inputs,
            labels=fixture.labels,
            names=names,
            channels_last=channels_last,
            zero_gradients=fixture.zero_gradients,
            device=device,
            float64=float64,
            randomize=False,
        )
        return read_replay(comparison, fixture)


def rebuilt(fixture: Fixture) -> Any:
    """Build the abstract Flax model that a fixture describes; raises ValueError if it describes none."""
    about = fixture.model
    if about is None:
        raise ValueError(
            f"flax_module=None: {fixture.name} does not describe its Flax model; pass one to parity.replay"
        )
    return abstract(about["model"], about["config"], Stored.of(fixture.state), fixture.name)


def read_replay(comparison: Comparison, fixture: Fixture) -> Report:
    """`replay` on a resolved comparison whose PyTorch module is a fixture."""
    began = time.perf_counter()
    batch = Batch(fixture.inputs, comparison.labels, fixture.targets)
    reference = Reference(comparison, batch, fixture.results, fixture.noises)
    notes = [*check_fit(comparison, fixture), *reference.notes]
    skipped = {kind: ABSENT for kind in KINDS if kind not in fixture.results and expected(kind, comparison)}
    with comparison.strict_precision():
        checks = list(readings(reference, fixture, skipped, notes))
    if not all(check.passed for check in checks):
        skipped["first divergence"] = NO_TRACE
    stamp = environment(comparison.device, comparison.float64, seed=None) | {"torch": f"{fixture.torch}, recorded"}
    return Report(fixture.name, checks, time.perf_counter() - began, stamp, skipped=skipped, notes=tuple(notes))


def expected(kind: str, comparison: Comparison) -> bool:
    """True unless a call has no results of a kind: inputs of integers have no gradients."""
    inputs = comparison.inputs.named().values()
    return kind != "input gradients" or any(jnp.issubdtype(array.dtype, jnp.inexact) for array in inputs)


def readings(reference: Reference, fixture: Fixture, skipped: dict[str, str], notes: list[str]) -> Iterator[Check]:
    """The checks of one fixture; adds those that do not apply to `skipped`, with the reason, and to `notes`."""
    comparison = reference.comparison
    yield round_trip(comparison)
    with comparison.strict_precision(False):  # as the module runs; see `Readings.narrow` of a check
        side = comparison.jax_side("float32")
        narrow = reference.values(side.evaluate(reference.batch), "float32")
    rounding: Limits = {}
    allowed = 1.0
    if comparison.float64:
        side = comparison.jax_side("float64")
        result = side.evaluate(reference.batch)
        values = reference.values(result)
        why = explained(
            reference, lambda changes: add_recorded(changes, fixture, comparison), side, result, values, narrow
        )
        notes += why.notes
        rounding, allowed = why.rounding, why.allowed
        for kind, of_kind in values.items():
            yield judged(kind, "float64", of_kind, why.limits[kind])
        yield from reference.zeros(result)
    for kind, of_kind in narrow.items():
        yield judged_narrow(kind, "float32", of_kind, fixture.own_values[kind], rounding.get(kind))
    if decodes(side.module):
        try:
            yield reference.decoding(side, own=fixture.own_values.get("output"), limit=LIMIT * allowed)
        except NotDecodable as reason:
            skipped["cached decoding"] = str(reason)


def add_recorded(changes: Changes, fixture: Fixture, comparison: Comparison) -> None:
    """Add how far PyTorch's results moved with the constants that the port does not get from the fixture."""
    for name, moves in fixture.constants.items():
        carried = name in fixture.state and comparison.weights.carries(name)
        if not carried and changes.add(moves) > 1 and len(changes.named) < NAMED:
            changes.named.append(f"{name} in PyTorch")
