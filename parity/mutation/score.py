"""`python -m parity.mutations`: the share of planted mistakes that the harness finds and names.

A sample of all mutants that apply is drawn by the seed, evenly over systems and operators; a mutant that changes
nothing is replaced by another. The unbroken cases are judged at many seeds too: a reading that exceeds its limit there
is a false alarm.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from parity.cases import Make, load_cases, select
from parity.cases.suite import pair_of
from parity.compare.inputs import Inputs
from parity.compare.sides import jax_side, torch_side
from parity.mutation.mutate import PRECISIONS, Mutant, Outcome, Subject, unbroken
from parity.mutation.operators import OPERATORS
from parity.report.results import Check

LONGEST = 150  # positions; longer sequences take more time and show nothing new
FREED_AFTER = 8  # mutants: JAX keeps every compiled function, which are several MB for each


def subjects(names: Sequence[str]) -> dict[str, Make]:
    """The cases of the given names or systems (default: all) that are short enough, by name."""
    found: dict[str, Make] = {}
    for name in select(list(names)):
        make = load_cases()[name][0]
        try:
            pair = pair_of(make, 0)
        except RuntimeError:  # a case that needs transformers, which is not installed
            continue
        arrays = Inputs.of(pair.inputs).named().values()
        if max(max(array.shape, default=0) for array in arrays) <= LONGEST:
            found[name] = make
    return found


def drawn(mutants: dict[str, list[Mutant]], rng: np.random.Generator) -> Iterator[Mutant]:
    """All mutants, alternating between systems; each time one of the operator that was drawn least often."""
    used: dict[str, int] = {}
    left = {system: list(rng.permutation(np.array(found, object))) for system, found in mutants.items()}
    while any(left.values()):
        for found in left.values():
            if found:
                mutant = min(found, key=lambda m: used.get(m.operator.name, 0))
                found.remove(mutant)
                used[mutant.operator.name] = used.get(mutant.operator.name, 0) + 1
                yield mutant


def sampled(found: dict[str, Make], per_system: int, seed: int) -> dict[str, Make]:
    """At most per_system of the cases of each system, by name."""
    rng, chosen = np.random.default_rng(seed), []
    for system in dict.fromkeys(case.partition(".")[0] for case in found):
        cases = [case for case in found if case.partition(".")[0] == system]
        chosen += list(rng.permutation(cases)[:per_system])
    return {case: make for case, make in found.items() if case in chosen}


def score(cases: dict[str, Make], count: int, seed: int, say: Callable[[str], None]) -> tuple[list[Outcome], int, int]:
    """Judge `count` mutants, evenly over the systems: (outcomes, mutants that changed nothing, all mutants)."""
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
        if outcome and not (outcome.found and outcome.named):
            say(row(outcome))
        if (len(outcomes) + idle) % FREED_AFTER == 0:
            jax.clear_caches()
            gc.collect()
    return outcomes, idle, sum(map(len, mutants.values()))


Alarms = dict[str, list[tuple[int, Check]]]


def page(outcomes: list[Outcome], idle: int, total: int, alarms: Alarms, seeds: int, command: str) -> str:
    """The outcomes as Markdown."""
    lines = [
        "# Planted errors, and the verdicts of the harness",
        "",
        f"Written by `{command}`; `python -m parity.mutations --help` lists its options.",
        "",
    ]
    if outcomes:
        lines += [*counts(outcomes, idle, total)]
    if seeds:
        lines += [*unbroken_lines(alarms, seeds)]
    if outcomes:
        lines += ["", "| case | sub-module | mistake | found by | named | hint |", "|---|---|---|---|---|---|"]
        lines += map(row, sorted(outcomes, key=lambda o: (o.mutant.case, o.mutant.culprit, o.mutant.operator.name)))
    lines += ["", "## The mistakes", "", "| mistake | change |", "|---|---|"]
    lines += [f"| {operator.name} | {operator.about} |" for operator in OPERATORS.values()]
    return "\n".join(lines) + "\n"


def counts(outcomes: list[Outcome], idle: int, total: int) -> Iterator[str]:
    """Lines about the mutants: their number, how many were found and named, and the smallest difference."""
    n, found, named = len(outcomes), sum(o.found for o in outcomes), sum(o.named for o in outcomes)
    smallest = min(outcomes, key=lambda o: o.value)
    yield f"- {n} mutants, drawn from {total} (operators × sub-modules); {idle} more changed no output and no gradient."
    yield f"- found: {found} of {n} ({100 * found / n:.0f} %)"
    yield f"- culprit named: {named} of {n} ({100 * named / n:.0f} %)"
    yield f"- smallest: {smallest.value:.1e} × noise, {smallest.mutant.operator.name} in {smallest.mutant.case}"


def unbroken_lines(alarms: Alarms, seeds: int) -> Iterator[str]:
    """Lines about the unbroken cases: false alarms, and the largest difference in each precision."""
    false = sum(not check.passed for checks in alarms.values() for _, check in checks)
    yield f"- false alarms: {false} in {len(alarms)} unbroken cases at {seeds} seeds each"
    for precision in PRECISIONS:
        read = [(c, case, seed) for case, checks in alarms.items() for seed, c in checks if c.precision == precision]
        check, case, seed = max(read, key=lambda found: found[0].value)
        own = "" if check.own is None else f" (PyTorch {check.own:.2g})"
        where = f"{check.kind} of {case} at seed {seed}"
        yield f"- largest in {precision}: {check.value:.2g} × noise{own}, limit {check.limit:.2g}: {where}"


def row(o: Outcome) -> str:
    """An outcome as a row of the table."""
    by = max(o.failed, key=lambda c: c.value, default=None)
    reading = f"{by.kind} {by.value:.0e}" if by else "**not found**"
    where = o.divergence
    verdict = "yes" if o.named else f"**{where.path or 'the model'}**" if where else "**nothing**"
    hint = where.hint if where else ""
    culprit = f"`{o.mutant.culprit}`" if o.mutant.culprit else "the model"
    return f"| {o.mutant.case} | {culprit} | {o.mutant.operator.name} | {reading} | {verdict} | {hint} |"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m parity.mutations",
        description="Plant porting mistakes in the Flax models, one at a time, and print a Markdown table of those "
        "that parity finds and names. Exit code: 1 if one is not found, if fewer than 90 % are named correctly, or if "
        "an unbroken model fails; else 0.",
    )
    arguments.add_argument("names", nargs="*", metavar="NAME", help="a case or a system (default: all short cases)")
    arguments.add_argument(
        "--count", type=int, default=60, help="mutants to judge (default: 60; 0: judge the unbroken cases alone)"
    )
    arguments.add_argument(
        "--cases",
        type=int,
        default=3,
        help="cases per system in which mistakes are planted, drawn by the seed (default: 3)",
    )
    arguments.add_argument("--seed", type=int, default=0, help="seed of the sample (default: 0)")
    arguments.add_argument(
        "--seeds", type=int, default=20, help="seeds at which all unbroken cases are judged (default: 20)"
    )
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    from rich.console import Console

    options = parser().parse_args(argv)
    console = Console(stderr=True)
    began = time.perf_counter()
    jax.config.update("jax_platforms", "cpu")
    with torch_side.strict_precision(), jax_side.strict_precision(True, jax.devices("cpu")[0]):
        try:
            for flag, least in (("count", 0), ("cases", 1), ("seed", 0), ("seeds", 0)):
                if getattr(options, flag) < least:
                    raise ValueError(f"--{flag} {getattr(options, flag)} must be at least {least}")
            with console.status("") as status:
                say = status.update if console.is_terminal else console.print  # in a file, one line per stage
                cases = subjects(options.names)
                chosen = sampled(cases, options.cases, options.seed) if options.count else {}
                outcomes, idle, total = score(chosen, options.count, options.seed, say)
                alarms: Alarms = {}
                for case, make in cases.items() if options.seeds else ():
                    say(f"{case}: {options.seeds} seeds")
                    alarms[case] = unbroken(make, options.seeds)
                    jax.clear_caches()
        except ValueError as error:
            print(f"python -m parity.mutations: {error}", file=sys.stderr)
            return 2
    command = " ".join(["python -m parity.mutations", *(sys.argv[1:] if argv is None else argv)])
    text = page(outcomes, idle, total, alarms, options.seeds, command)
    print(text, end="")
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    named = sum(outcome.named for outcome in outcomes)
    good = (
        all(o.found for o in outcomes)
        and named >= 0.9 * len(outcomes)
        and all(c.passed for checks in alarms.values() for _, c in checks)
    )
    return 0 if good else 1
