"""`python -m parity.mutations`: plants porting mistakes one at a time, and counts how many are found and named.

A mutant is an operator at one sub-module of one case. All that apply are listed, a sample is drawn by the seed, evenly
over systems and operators, and each is judged as `parity.check` would in float64: found is a reading past its limit,
named is the path of the first divergence. What changes no output and no gradient of the Flax model itself is no mistake
and is drawn again. The unbroken cases are judged at many seeds besides: a false alarm is a reading past its limit.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from parity.cases import Make, load_cases, select
from parity.cases.suite import pair_of
from parity.compare import jax_side, torch_side
from parity.compare.inputs import Inputs
from parity.compare.names import Weights, weights_of
from parity.locate.trace import trace
from parity.locate.tree import Divergence
from parity.measure import limits
from parity.measure.check import Pair, Readings
from parity.mutation.operators import CALLED, OPERATORS, Operator, planted_calls
from parity.report.results import Check

LONGEST = 150  # positions; a case on longer sequences proves the same and takes longer
EFFECT = 10 * limits.FLOAT64_LIMIT


class Planted:
    """Weights that make a mistake in one sub-module as they are loaded."""

    def __init__(self, inner: Weights, path: tuple, operator: Operator):
        self.inner, self.path, self.operator = inner, path, operator
        self.read, self.held, self.module, self.carries = inner.read, inner.held, inner.module, inner.carries

    def load(self, model: Any, state_dict: Any) -> Any:
        model = self.inner.load(model, state_dict)
        make = self.operator.change(dict(nnx.iter_modules(model))[self.path])
        assert make is not None
        make()
        return model


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One operator at one sub-module of a case. culprit: PyTorch's path of it, or of what encloses it and is called."""

    case: str
    path: tuple
    culprit: str
    operator: Operator


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the harness said of a mutant: the readings past their limits, and what it named."""

    mutant: Mutant
    failed: list[Check]
    divergence: Divergence | None

    @property
    def found(self) -> bool:
        return bool(self.failed)

    @property
    def named(self) -> bool:
        return self.divergence is not None and self.divergence.path == self.mutant.culprit


class Subject:
    """A pair that mistakes are planted in, with what its unbroken Flax model gives."""

    def __init__(self, case: str, make: Make):
        self.case = case
        given = pair_of(make, 0)
        self.given, self.inputs = given, Inputs.of(given.inputs)
        module = torch_side.randomized(given.torch, 0)
        self.pair = Pair(module, given.flax, weights_of(module, given.flax, None))
        self.readings = self.read(self.pair)
        side = self.pair.side(self.readings.truth_side.module.state_dict(), self.inputs, jnp.float64)
        self.unbroken = side.evaluate(self.inputs, given.labels, self.readings.targets)
        tree = trace(self.readings.truth_side, side, self.inputs).forward
        self.called = {part.path for part in tree.walk() if part.propagated is not None}

    def read(self, pair: Pair) -> Readings:
        device, given = jax.devices()[0], self.given
        arguments = (self.inputs, given.labels, given.zero_gradients, 0, device, True, 0, lambda stage: None)
        return Readings(pair, *arguments)

    def mutants(self) -> Iterator[Mutant]:
        """Every operator at every sub-module that it applies to; layers that are stacked are one."""
        model = self.pair.weights.load(self.pair.flax, self.readings.truth_side.module.state_dict())
        torch_paths = {self.pair.weights.module(path): path for path, _ in self.pair.torch.named_modules()}
        for path, module in nnx.iter_modules(model):
            words = [str(word) for word in path]
            name = torch_paths.get(".".join(words))
            for i, word in enumerate(words):
                if name is None and word == "layers":
                    name = torch_paths.get(".".join([*words[: i + 1], "0", *words[i + 1 :]]))
            if name is None:
                continue
            called = name in self.called
            while name not in self.called:
                name = name.rpartition(".")[0]
            for operator in OPERATORS.values():
                if (called or operator.name not in CALLED) and operator.change(module) is not None:
                    yield Mutant(self.case, path, name, operator)

    def judge(self, mutant: Mutant) -> Outcome | None:
        """None for what changes nothing."""
        planted: Any = Planted(self.pair.weights, mutant.path, mutant.operator)
        pair = dataclasses.replace(self.pair, weights=planted)
        readings = self.readings
        with planted_calls(self.pair.flax):
            side = pair.side(readings.truth_side.module.state_dict(), self.inputs, jnp.float64)
            result = side.evaluate(self.inputs, self.given.labels, readings.targets)
            effects = [limits.errors(result[kind], self.unbroken[kind]) for kind in result]
            if max(limits.worst(effect)[1] for effect in effects) < EFFECT:
                return None
            checks = [
                readings.limited(kind, limits.errors(readings.read(result, kind), truth))
                for kind, truth in readings.truth.items()
            ]
            failed = [check for check in checks if not check.passed]
            readings.pair = pair
            try:
                return Outcome(mutant, failed, readings.divergence(failed) if failed else None)
            finally:
                readings.pair = self.pair


def false_alarms(make: Make, seeds: int) -> list[tuple[int, Check]]:
    """Readings past their limits of an unbroken pair, at each seed; its two precisions are compiled once."""
    alarms: list[tuple[int, Check]] = []
    sides: dict[Any, jax_side.FlaxSide] = {}
    for seed in range(seeds):
        given = pair_of(make, seed)
        module = torch_side.randomized(given.torch, seed)
        pair, inputs = Pair(module, given.flax, weights_of(module, given.flax, None)), Inputs.of(given.inputs)
        device = jax.devices()[0]
        readings = Readings(pair, inputs, given.labels, given.zero_gradients, 0, device, True, seed, lambda stage: None)
        sides = sides or {d: pair.side(module.state_dict(), inputs, d) for d in (jnp.float64, jnp.float32)}
        alarms += [(seed, check) for check in compared(readings, sides) if not check.passed]
    return alarms


def compared(readings: Readings, sides: dict[Any, jax_side.FlaxSide]) -> Iterator[Check]:
    """Outputs and gradients in float64 and float32, by sides that were compiled for other weights."""
    arguments = (readings.inputs, readings.labels, readings.targets)
    theirs = torch_side.TorchSide(readings.module, torch.float32, "cpu")
    wide = sides[jnp.float64].loaded(readings.truth_side.module.state_dict()).evaluate(*arguments)
    narrow, own = (
        sides[jnp.float32].loaded(theirs.module.state_dict()).evaluate(*arguments),
        theirs.evaluate(*arguments),
    )
    for kind, truth in readings.truth.items():
        yield readings.limited(kind, limits.errors(readings.read(wide, kind), truth))
        yield readings.limited(kind, limits.ratios(readings.read(narrow, kind), own[kind], truth), "float32")
    yield from readings.zeros(wide)


def subjects(names: Sequence[str]) -> dict[str, Make]:
    """The cases of the given systems (all for none) that are short enough, by name."""
    found: dict[str, Make] = {}
    for name in select(list(names)):
        make = load_cases()[name][0]
        try:
            pair = pair_of(make, 0)
        except RuntimeError:  # a case that needs transformers, where it is not installed
            continue
        arrays = Inputs.of(pair.inputs).named().values()
        if max(max(array.shape, default=0) for array in arrays) <= LONGEST:
            found[name] = make
    return found


def drawn(mutants: dict[str, list[Mutant]], rng: np.random.Generator) -> Iterator[Mutant]:
    """All mutants of all systems in turn: of each system one of the operator that it had the fewest of so far."""
    used: dict[str, int] = {}
    left = {system: list(rng.permutation(np.array(found, object))) for system, found in mutants.items()}
    while any(left.values()):
        for found in left.values():
            if found:
                mutant = min(found, key=lambda m: used.get(m.operator.name, 0))
                found.remove(mutant)
                used[mutant.operator.name] = used.get(mutant.operator.name, 0) + 1
                yield mutant


def sampled(names: Sequence[str], per_system: int, seed: int) -> dict[str, Make]:
    """At most so many cases of each system, by name."""
    found = subjects(names)
    rng, chosen = np.random.default_rng(seed), []
    for system in dict.fromkeys(case.partition(".")[0] for case in found):
        cases = [case for case in found if case.partition(".")[0] == system]
        chosen += list(rng.permutation(cases)[:per_system])
    return {case: make for case, make in found.items() if case in chosen}


def score(cases: dict[str, Make], count: int, seed: int, say: Callable[[str], None]) -> tuple[list[Outcome], int, int]:
    """Judges `count` mutants, evenly over the systems: the outcomes, how many changed nothing, how many there are."""
    found = {}
    for case, make in cases.items():
        say(f"preparing {case}")
        found[case] = Subject(case, make)
    mutants: dict[str, list[Mutant]] = {}
    for case, subject in found.items():
        mutants.setdefault(case.partition(".")[0], []).extend(subject.mutants())
    outcomes: list[Outcome] = []
    idle = 0
    for mutant in drawn(mutants, np.random.default_rng(seed)):
        if len(outcomes) == count:
            break
        say(f"{len(outcomes)} of {count}: {mutant.operator.name} at {mutant.case}, {mutant.culprit or 'the model'}")
        outcome = found[mutant.case].judge(mutant)
        idle += outcome is None
        outcomes += [outcome] if outcome else []
    return outcomes, idle, sum(map(len, mutants.values()))


def page(outcomes: list[Outcome], idle: int, total: int, alarms: dict[str, list], seeds: int, command: str) -> str:
    """The outcomes as Markdown."""
    n = len(outcomes)
    found, named = sum(o.found for o in outcomes), sum(o.named for o in outcomes)
    false = sum(map(len, alarms.values()))
    lines = [
        "# Planted errors, and what the harness says of them",
        "",
        f"Written by `{command}`; `python -m parity.mutations --help` says what an operator and a mutant are.",
        "",
        f"- {n} mutants, drawn from {total} (operators × sub-modules); {idle} more changed no output and no gradient.",
        f"- found: {found} of {n} ({100 * found / max(n, 1):.0f} %)",
        f"- culprit named: {named} of {n} ({100 * named / max(n, 1):.0f} %)",
    ]
    if seeds:
        lines.append(f"- false alarms: {false}, of {len(alarms)} unbroken cases at {seeds} seeds each")
    lines += ["", "| case | sub-module | mistake | found by | named | hint |", "|---|---|---|---|---|---|"]
    for o in sorted(outcomes, key=lambda o: (o.mutant.case, o.mutant.culprit, o.mutant.operator.name)):
        by = max(o.failed, key=lambda c: c.value, default=None)
        reading = f"{by.kind} {by.value:.0e}" if by else "**not found**"
        where = o.divergence
        verdict = "yes" if o.named else f"**{where.path or 'the model'}**" if where else "**nothing**"
        hint = where.hint if where else ""
        culprit = f"`{o.mutant.culprit}`" if o.mutant.culprit else "the model"
        lines.append(f"| {o.mutant.case} | {culprit} | {o.mutant.operator.name} | {reading} | {verdict} | {hint} |")
    lines += ["", "## The mistakes", "", "| mistake | what is done |", "|---|---|"]
    lines += [f"| {operator.name} | {operator.about} |" for operator in OPERATORS.values()]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog="python -m parity.mutations",
        description="Plants porting mistakes in the Flax models, one at a time, and prints as Markdown which of them "
        "parity finds and names. Exits 1 where one is not found, fewer than 90 % are named right, or an unbroken model "
        "fails.",
    )
    arguments.add_argument("names", nargs="*", metavar="NAME", help="a case or a system (default: all that are short)")
    arguments.add_argument("--count", type=int, default=60, help="mutants to judge (default 60)")
    arguments.add_argument("--cases", type=int, default=3, help="cases of each system, drawn by the seed (default 3)")
    arguments.add_argument("--seed", type=int, default=0, help="seed of the sample (default 0)")
    arguments.add_argument(
        "--seeds", type=int, default=20, help="seeds at which unbroken models are judged (default 20)"
    )
    return arguments


def main(argv: list[str] | None = None) -> int:
    from rich.console import Console

    options = parser().parse_args(argv)
    console = Console(stderr=True)
    began = time.perf_counter()
    jax.config.update("jax_platforms", "cpu")
    with torch_side.strict_precision(), jax_side.strict_precision(True, jax.devices("cpu")[0]):
        try:
            with console.status("") as status:
                say = status.update if console.is_terminal else console.print  # a file gets a line each
                cases = sampled(options.names, options.cases, options.seed)
                outcomes, idle, total = score(cases, options.count, options.seed, say)
                alarms = {}
                for case, make in cases.items() if options.seeds else ():
                    say(f"{case}: {options.seeds} seeds")
                    alarms[case] = false_alarms(make, options.seeds)
        except ValueError as error:
            print(f"parity.mutations: {error}", file=sys.stderr)
            return 2
    command = " ".join(["python -m parity.mutations", *(sys.argv[1:] if argv is None else argv)])
    text = page(outcomes, idle, total, alarms, options.seeds, command)
    print(text, end="")
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    named = sum(outcome.named for outcome in outcomes)
    good = all(o.found for o in outcomes) and named >= 0.9 * len(outcomes) and not any(alarms.values())
    return 0 if good else 1
