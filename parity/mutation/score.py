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
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxmodels.process.allocator import return_freed_memory
from jaxmodels.process.arguments import Parser
from jaxmodels.process.texts import shortened, table_cell
from parity.cases import Make, load_cases, select
from parity.cases.suite import pair_of
from parity.compare.inputs import Inputs
from parity.compare.sides import jax_side, torch_side
from parity.mutation.mutate import PRECISIONS, Mutant, Subject, unbroken
from parity.mutation.operators import OPERATORS
from parity.mutation.state import Alarms, Row, State

if TYPE_CHECKING:
    from rich.status import Status

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


def score(
    cases: dict[str, Make], count: int, seed: int, state: State, say: Callable[[str], None]
) -> tuple[list[Row], int, int]:
    """Judge `count` mutants, evenly over the systems: (rows, mutants that changed nothing, all mutants)."""
    found = {}
    for case, make in cases.items():
        say(f"preparing {case}")
        found[case] = Subject(case, make)
    mutants: dict[str, list[Mutant]] = {}
    for case, subject in found.items():
        mutants.setdefault(case.partition(".")[0], []).extend(subject.mutants())
    rows: list[Row] = []
    idle = 0
    for mutant in drawn(mutants, np.random.default_rng(seed)):
        if len(rows) == count:
            break
        say(f"{len(rows)} of {count}: {mutant.operator.name} at {mutant.case}, {mutant.culprit or 'the model'}")
        if mutant.key not in state.rows:
            outcome = found[mutant.case].judge(mutant)
            state.add(mutant.key, None if outcome is None else Row.of(outcome))
            if len(state.rows) % FREED_AFTER == 0:
                jax.clear_caches()
                gc.collect()
                return_freed_memory()
        row = state.rows[mutant.key]
        idle += row is None
        rows += [row] if row else []
        if row and not (row.found and row.named):
            say(str(row))
    return rows, idle, sum(map(len, mutants.values()))


def judged(cases: dict[str, Make], seeds: int, state: State, say: Callable[[str], None]) -> Alarms:
    """Readings of unbroken cases at seeds from 0, with the seed of each."""
    alarms: Alarms = {}
    for case, make in cases.items():
        say(f"{case}: {seeds} seeds")
        if (case, seeds) not in state.alarms:
            state.add_alarms(case, seeds, unbroken(make, seeds))
            jax.clear_caches()
        alarms[case] = state.alarms[case, seeds]
    return alarms


def page(rows: list[Row], idle: int, total: int, alarms: Alarms, seeds: int, command: str) -> str:
    """The outcomes as Markdown."""
    lines = [
        "# Planted errors, and the verdicts of the harness",
        "",
        f"Written by `{command}`; `python -m parity.mutations --help` lists its options.",
        "",
    ]
    if rows:
        lines += [*counts(rows, idle, total)]
    if seeds:
        lines += [*unbroken_lines(alarms, seeds)]
    if rows:
        lines += ["", "| case | sub-module | mistake | found by | named | hint |", "|---|---|---|---|---|---|"]
        lines += map(str, sorted(rows, key=lambda row: (row.case, row.culprit, row.operator)))
    lines += ["", "## The mistakes", "", "| mistake | change |", "|---|---|"]
    lines += [f"| {table_cell(operator.name)} | {table_cell(operator.about)} |" for operator in OPERATORS.values()]
    return "\n".join(lines) + "\n"


def counts(rows: list[Row], idle: int, total: int) -> Iterator[str]:
    """Lines about the mutants: their number, how many were found and named, and the smallest difference."""
    n, found, named = len(rows), sum(row.found for row in rows), sum(row.named for row in rows)
    smallest = min(rows, key=lambda row: row.value)
    yield f"- {n} mutants, drawn from {total} (operators × sub-modules); {idle} more changed no output and no gradient."
    yield f"- found: {found} of {n} ({100 * found / n:.0f} %)"
    yield f"- culprit named: {named} of {n} ({100 * named / n:.0f} %)"
    yield f"- smallest: {smallest.value:.1e} × noise, {table_cell(f'{smallest.operator} in {smallest.case}')}"


def unbroken_lines(alarms: Alarms, seeds: int) -> Iterator[str]:
    """Lines about the unbroken cases: false alarms, and the largest difference in each precision."""
    false = sum(not check.passed for checks in alarms.values() for _, check in checks)
    yield f"- false alarms: {false} in {len(alarms)} unbroken cases at {seeds} seeds each"
    for precision in PRECISIONS:
        read = [(c, case, seed) for case, checks in alarms.items() for seed, c in checks if c.precision == precision]
        check, case, seed = max(read, key=lambda found: found[0].value)
        own = "" if check.own is None else f" (PyTorch {check.own:.2g})"
        where = table_cell(f"{check.kind} of {case} at seed {seed}")
        yield f"- largest in {precision}: {check.value:.2g} × noise{own}, limit {check.limit:.2g}: {where}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = Parser(
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
    arguments.add_argument(
        "--state", type=Path, metavar="FILE", help="file of the verdicts so far, to continue a run that was interrupted"
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
                say = in_status(status) if console.is_terminal else plain_line  # in a file, one line per stage
                cases = subjects(options.names)
                chosen = sampled(cases, options.cases, options.seed) if options.count else {}
                with State.opened(options.state) as state:
                    rows, idle, total = score(chosen, options.count, options.seed, state, say)
                    alarms = judged(cases if options.seeds else {}, options.seeds, state, say)
        except ValueError as error:
            print(f"python -m parity.mutations: {shortened(str(error))}", file=sys.stderr)
            return 2
    command = " ".join(["python -m parity.mutations", *(sys.argv[1:] if argv is None else argv)])
    print(page(rows, idle, total, alarms, options.seeds, command), end="")
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    named = sum(row.named for row in rows)
    passed = all(check.passed for checks in alarms.values() for _, check in checks)
    return 0 if all(row.found for row in rows) and named >= 0.9 * len(rows) and passed else 1


def in_status(status: "Status") -> Callable[[str], None]:
    """Function that shows a text beside a spinner as it is: rich would read [names] as its markup."""
    from rich.text import Text

    def show(text: str) -> None:
        status.update(Text(text))

    return show


def plain_line(text: str) -> None:
    """Print a line about progress to a file."""
    print(text, file=sys.stderr, flush=True)
