"""`python -m parity`: every case, a table, a non-zero exit where any differs."""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from parity.cases.processes import examined, prepare_jax, workers_for

LEGEND = (
    "float64: max|Δ| / max|truth|, at most 1e-10. Narrower: Flax's error against the float64 truth ÷ (PyTorch's own + "
    "2.5e-7), at most 4. bits: tensors changed by torch → Flax → torch."
)
READINGS = {
    "output": "output",
    "∂params": "parameter gradients",
    "∂inputs": "input gradients",
    "decode": "cached decoding",
    "losses": "training loss",
    "trained": "trained parameters",
}
COLUMNS = [(heading, kind, precision) for precision in ("float64", "float32") for heading, kind in READINGS.items()]
COLUMNS += [("output", "output", precision) for precision in ("bfloat16", "float16")]
COLUMNS += [("bits", "round trip", "bits")]
VARIANTS = {  # of parity.measure.invariances, which is not imported before it is known where JAX runs
    "jit": "jit / no jit",
    "unrolled": "scanned / unrolled",
    "8 devices": "1 / 8 devices",
    "cached": "cached / full",
    "padded": "padded / unpadded",
    "accumulated": "accumulated / whole batch",
}


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog="python -m parity",
        description="Runs Flax models against their PyTorch twins and says how closely they agree. "
        "Without names, all cases run. Exits 1 where any case differs, 2 where one ends in an error.",
    )
    arguments.add_argument("names", nargs="*", metavar="NAME", help="a case (rope.attention) or a system (rope)")
    arguments.add_argument(
        "--device",
        choices=["cpu", "gpu", "tpu"],
        help="where Flax runs (default: JAX's default); gpu and tpu imply --fast",
    )
    arguments.add_argument("--list", action="store_true", help="name the cases and exit")
    arguments.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes (default: 1 for each core, up to 4, for many cases on a CPU)",
    )
    arguments.add_argument("--seed", type=int, default=0, help="seed of weights, inputs and targets (default 0)")
    more = arguments.add_argument_group("more readings of each case")
    more.add_argument("--all", action="store_true", help="all of these; trajectories with Adam")
    more.add_argument(
        "--invariances", action="store_true", help="jit, unrolling, 8 devices, caches, padding, accumulated gradients"
    )
    more.add_argument("--sweep", action="store_true", help="every floating dtype, layer by layer; KL and best tokens")
    more.add_argument(
        "--trajectory", nargs="+", metavar="OPTIMIZER", default=[], help="training compared after every step"
    )
    more.add_argument("--steps", type=int, default=100, metavar="N", help="of a trajectory (default 100)")
    more.add_argument("--fast", action="store_true", help="what the default matmul precision costs, and two runs' bits")
    more.add_argument("--matmul-precision", metavar="NAME", help="the fast precision, where not the device's default")
    files = arguments.add_argument_group("files")
    files.add_argument("--json", type=Path, metavar="FILE", help="write all readings as JSON")
    files.add_argument("--junit", type=Path, metavar="FILE.xml", help="write them as JUnit XML")
    files.add_argument("--report", type=Path, metavar="FILE.html", help="write one self-contained page")
    golden = arguments.add_argument_group("golden fixtures, instead of running both sides")
    golden.add_argument(
        "--record",
        type=Path,
        metavar="FOLDER",
        help="write what PyTorch computes: the small models (feedback.own), by name a case",
    )
    golden.add_argument(
        "--replay",
        type=Path,
        nargs="?",
        const=True,
        metavar="FOLDER",
        help="judge Flax by a folder's fixtures, without torch (default: those that come with the package)",
    )
    return arguments


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    console = Console()
    if not console.is_terminal:  # a file has no width to fit: a whole table is worth more than one folded to 80
        console = Console(width=184)
    prepare_jax(options.device, eight=options.invariances or options.all)
    files = {"json": options.json, "junit": options.junit, "page": options.report}
    try:
        for file in filter(None, files.values()):
            if not file.absolute().parent.is_dir():
                raise ValueError(f"{file} cannot be written: there is no folder {file.absolute().parent}")
        if options.list or options.record:
            return show(options, console) if options.list else record_all(options, console)
        refuse(options)
        reports = replay_all(options, console) if options.replay else run(options, console)
    except (ValueError, RuntimeError) as error:
        print(f"parity: {error}", file=sys.stderr)
        return 2
    summary(reports, console)
    details(reports, console)
    if any(files.values()):
        from parity.report.write import write

        write(*reports, **files)
    if any(report.error for report in reports):
        return 2
    return 0 if all(report.passed for report in reports) else 1


def show(options: argparse.Namespace, console: Console) -> int:
    from parity.cases import load_cases, select

    for name in select(options.names):
        console.print(f"{name:40} {load_cases()[name][1]}", highlight=False)
    return 0


def refuse(options: argparse.Namespace) -> None:
    """Raises ValueError or RuntimeError for what no case could run with."""
    import jax

    if options.device:
        jax.devices(options.device)
    try:
        with jax.default_matmul_precision(options.matmul_precision):
            pass
    except ValueError as error:
        raise ValueError(f"--matmul-precision {options.matmul_precision}: {error}") from None
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers {options.workers} must be at least 1")
    if options.steps < 1:
        raise ValueError(f"--steps {options.steps} must be at least 1")


def run(options: argparse.Namespace, console: Console) -> list:
    """One report per case, with a progress bar."""
    import jax

    from parity.cases import load_cases, select
    from parity.cases.suite import Wanted, examine
    from parity.measure.optimizers import OPTIMIZERS

    names, every = select(options.names), options.all
    unknown = [name for name in options.trajectory if name not in OPTIMIZERS]
    if unknown:
        raise ValueError(f"--trajectory {' '.join(unknown)}: there are {', '.join(OPTIMIZERS)}")
    wanted = Wanted(
        invariances=every or options.invariances,
        sweep=every or options.sweep,
        trajectories=tuple(dict.fromkeys(options.trajectory or (["adam"] if every else []))),
        steps=options.steps,
        fast=every or options.fast or options.matmul_precision is not None or options.device in ("gpu", "tpu"),
        matmul_precision=options.matmul_precision,
    )
    common = {"device": options.device, "seed": options.seed}
    workers = options.workers or workers_for(len(names), options.device or jax.default_backend())
    prepare = functools.partial(prepare_jax, options.device, eight=wanted.invariances)
    found = examined(names, wanted, **common, workers=workers, prepare=prepare)
    cases, reports = load_cases(), []
    for name, progress, stage in bar(names, console):
        one = next(found) if workers > 1 else examine(cases[name][0], name, wanted, **common, progress=stage)
        reports.append(one)
        if not reports[-1].passed:
            progress.console.print(str(reports[-1]), style="red", markup=False, highlight=False)
    return reports


def bar(names: list[str], console: Console) -> Iterator[tuple[str, Progress, Callable[[str], None]]]:
    """The names, one after the other, with the bar and what tells it of a stage."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=name)
            yield name, progress, functools.partial(tell, progress, task, name)
            progress.advance(task)


def tell(progress: Progress, task: TaskID, name: str, stage: str) -> None:
    progress.update(task, description=f"{name}: {stage}")


def record_all(options: argparse.Namespace, console: Console) -> int:
    """Fixtures of the small models: all, or those named. A name of none of them is a case's.

    What cannot be rebuilt is left out, by name.
    """
    from parity.cases import load_cases, matching, select
    from parity.cases.golden import GOLDEN
    from parity.cases.suite import pair_of
    from parity.golden.record import description, record

    if not options.record.is_dir():
        raise ValueError(f"{options.record} cannot be written: there is no such folder")
    cases = {name: make for name, (make, _) in load_cases().items()}
    select(options.names, GOLDEN | cases, "small model or case")
    makes = {} if options.names else GOLDEN
    for name in options.names:
        known = GOLDEN if matching(name, GOLDEN) else cases
        makes |= {one: known[one] for one in matching(name, known)}
    for name, _, _ in bar(list(makes), console):
        pair = pair_of(makes[name], options.seed)
        if description(pair.flax) is None:
            console.print(f"{name} is left out: {type(pair.flax).__name__} is no language model", highlight=False)
            continue
        record(
            *(pair.torch, pair.inputs, options.record / name),
            flax_module=pair.flax,
            labels=pair.labels,
            zero_gradients=pair.zero_gradients,
            seed=options.seed,
            name=name,
        )
    console.print(f"{len(list(options.record.glob('*.json')))} fixtures in {options.record}", highlight=False)
    return 0


def replay_all(options: argparse.Namespace, console: Console) -> list:
    """One report per fixture, those named or all."""
    from parity.cases import select
    from parity.golden.record import SHIPPED, replay, stems
    from parity.report.report import Report

    folder = SHIPPED if options.replay is True else options.replay
    found = {file.stem: file for file in stems(folder)}
    replayed = functools.partial(replay, None, device=options.device)
    reports = []
    for name, progress, _ in bar(select(options.names, found, "fixture"), console):
        reports.append(Report.gathered(name, map(replayed, [found[name]])))
        if not reports[-1].passed:
            progress.console.print(str(reports[-1]), style="red", markup=False, highlight=False)
    return reports


def summary(reports: list, console: Console) -> None:
    """The table, what its numbers mean, and the stamp."""
    from parity.report.stamp import joined

    shown = [c for c in COLUMNS if any(report.value(*c[1:]) is not None for report in reports)]
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("case", no_wrap=True)
    for heading, _, precision in shown:
        table.add_column(f"{precision}\n{heading}", justify="right")
    table.add_column("\nresult")
    table.add_column("\ns", justify="right")
    for report in reports:
        cells = [cell(report, kind, precision) for _, kind, precision in shown]
        colour = "green" if report.passed else "red"
        table.add_row(report.name, *cells, f"[{colour}]{report.verdict}[/]", f"{report.seconds:.1f}")
    console.print(table)
    passed = sum(report.passed for report in reports)
    console.print(f"{passed} of {len(reports)} cases agree. {LEGEND}", highlight=False, soft_wrap=True)
    stamp = ", ".join(f"{key} {value}" for key, value in joined(r.environment for r in reports).items())
    console.print(stamp, style="dim", highlight=False, soft_wrap=True)


def details(reports: list, console: Console) -> None:
    """What was read beside the checks: variants as a table, the rest as text."""
    shown = [(heading, kind) for heading, kind in VARIANTS.items() if any(r.check(kind) for r in reports)]
    if shown:
        table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("must not change", no_wrap=True)
        for heading, _ in shown:
            table.add_column(heading, justify="right")
        for report in reports:
            table.add_row(report.name, *(variant(report.check(kind)) for _, kind in shown))
        console.print(table)
    for report in reports:
        lines = [*map(str, report.costs), *(str(c) for c in report.checks if c.kind.startswith("two runs"))]
        parts = [*lines, *map(str, filter(None, (report.sweep, *report.trajectories)))]
        if parts:
            console.print(report.name, style="bold", highlight=False)
            console.print("\n".join(parts), markup=False, highlight=False, soft_wrap=True)


def variant(check) -> str:
    if check is None:
        return "[dim]–[/]"
    return f"{check.value:.0e}" if check.passed else f"[red]{check.value:.0e}[/]"


def cell(report, kind: str, precision: str) -> str:
    found = next((c for c in report.checks if (c.kind, c.precision) == (kind, precision)), None)
    if found is None:
        return "[dim]–[/]"
    text = {"float64": f"{found.value:.0e}", "bits": f"{found.value:.0f}"}.get(precision, f"{found.value:.2f}×")
    return text if found.passed else f"[red]{text}[/]"
