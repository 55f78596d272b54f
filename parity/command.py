"""The console command `parity`, also `python -m parity`: compare the project's models with PyTorch and print a table.

Optional packages and JAX are imported inside functions: --help and --version need no extra, and options that configure
JAX are set before its first use.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxmodels import __version__
from jaxmodels.process.arguments import Parser
from jaxmodels.process.extras import require
from jaxmodels.process.programs import run
from jaxmodels.process.seeds import seed_32
from jaxmodels.process.texts import visible
from parity.cases.processes import default_workers, examine_in_processes, prepare_jax

if TYPE_CHECKING:
    from rich.console import Console

    from parity.cases.suite import Selection
    from parity.report.report import Report

EXAMPLES = """\
examples:
  {prog}                                     every case
  {prog} rope.attention neox                 one case, and all cases of a system
  {prog} rope --all --report rope.html       with every further check, as an HTML page
  {prog} neox --trajectory adamw sgd --steps 30
  {prog} --replay                            without torch, from recorded results
  {prog} verify HF/ OUT/ --numerics          two checkpoints: tensors and outputs; see {prog} verify --help

Exit code: 0 if all cases agree, 1 if a case differs, 2 after an error.
"""


def parser(prog: str) -> argparse.ArgumentParser:
    arguments = Parser(
        prog=prog,
        description="Compare Flax models with their PyTorch counterparts and print how closely they agree.",
        epilog=EXAMPLES.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument(
        "names", nargs="*", metavar="NAME", help="a case (rope.attention) or a system (rope) (default: all cases)"
    )
    arguments.add_argument("--version", action="version", version=f"parity {__version__}")
    arguments.add_argument("--list", action="store_true", help="list the cases and exit")
    arguments.add_argument(
        "--device",
        choices=["cpu", "gpu", "tpu"],
        help="device for Flax; gpu and tpu imply --fast (default: JAX's default device)",
    )
    arguments.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="number of processes (default: one per core, at most 4, for 8 or more cases on a CPU; else 1)",
    )
    arguments.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of weights, inputs and targets (default: 0)"
    )
    more = arguments.add_argument_group("further checks")
    more.add_argument("--all", action="store_true", help="all checks of this group, with --trajectory adam")
    more.add_argument(
        "--invariances",
        action="store_true",
        help="compare with the model without jit, unrolled, on 8 devices, cached, padded, with accumulated gradients",
    )
    more.add_argument(
        "--sweep",
        action="store_true",
        help="compare every sub-module in float64, float32, bfloat16 and float16; also KL divergence and top tokens",
    )
    more.add_argument(
        "--trajectory",
        nargs="+",
        metavar="OPTIMIZER",
        default=[],
        help="train both sides with each optimizer (sgd, momentum, adam, adamw, …) and compare after every step",
    )
    more.add_argument("--steps", type=int, default=100, metavar="N", help="steps of a trajectory (default: 100)")
    more.add_argument(
        "--fast",
        action="store_true",
        help="also run at the device's default matmul precision; report its error and run-to-run determinism",
    )
    more.add_argument(
        "--matmul-precision",
        metavar="NAME",
        help="matmul precision of --fast, as in jax.default_matmul_precision; implies --fast (default: the device's)",
    )
    files = arguments.add_argument_group("files")
    files.add_argument("--json", type=Path, metavar="FILE", help="write all checks as JSON")
    files.add_argument("--junit", type=Path, metavar="FILE.xml", help="write all checks as JUnit XML")
    files.add_argument("--report", type=Path, metavar="FILE.html", help="write one self-contained HTML page")
    golden = arguments.add_argument_group("golden fixtures, instead of comparing with PyTorch directly")
    golden.add_argument(
        "--record",
        type=Path,
        metavar="FOLDER",
        help="record PyTorch's results of the small models (feedback.own, …), or of the named models or cases",
    )
    golden.add_argument(
        "--replay",
        type=Path,
        nargs="?",
        const=True,
        metavar="FOLDER",
        help="compare Flax with recorded results, without torch (default folder: the fixtures of the package)",
    )
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = "parity") -> int:
    """Run the command and return its exit code. prog: the command as typed, for its help and errors."""
    given = sys.argv[1:] if argv is None else argv
    if given and given[0] == "verify":
        from parity.checkpoint import verify

        return verify.main(given[1:], f"{prog} verify")
    return run(lambda: dispatch(parser(prog).parse_args(given)), prog)


def dispatch(options: argparse.Namespace) -> int:
    """Check the options, then list, record, replay or compare."""
    from parity.report.write import check_files, write

    files = {"--json": options.json, "--junit": options.junit, "--report": options.report}
    check_files(files)
    if not options.list:
        require("golden", "rich")
    if not options.replay or options.list:
        require("torch", "torch")
    if options.list:
        return print_cases(options.names)
    from parity.report.terminal import make_console, summary

    prepare_jax(options.device, eight=options.invariances or options.all)
    check_options(options)
    console = make_console()
    if options.record:
        return record_all(options, console)
    reports = replay_all(options, console) if options.replay else compare(options, console)
    summary(reports, console)
    if any(files.values()):
        write(*reports, json=options.json, junit=options.junit, page=options.report)
    if any(report.error for report in reports):
        return 2
    return 0 if all(report.passed for report in reports) else 1


def check_options(options: argparse.Namespace) -> None:
    """Raise ValueError for options that are invalid for every case."""
    import jax

    for flag, least in (("workers", 1), ("steps", 1), ("seed", 0)):
        value = getattr(options, flag)
        if value is not None and value < least:
            raise ValueError(f"--{flag} {value} must be at least {least}")
    options.seed = seed_32(options.seed)
    try:
        jax.devices(options.device)
    except RuntimeError as error:
        raise ValueError(f"--device {options.device or '(default)'}: {error}") from None
    try:
        with jax.default_matmul_precision(options.matmul_precision):
            pass
    except ValueError as error:
        raise ValueError(f"--matmul-precision {options.matmul_precision}: {error}") from None


def print_cases(names: Sequence[str]) -> int:
    from parity.cases import load_cases, select

    for name in select(names):
        print(f"{name:40} {load_cases()[name][1]}")
    return 0


def selection_of(options: argparse.Namespace) -> "Selection":
    """The checks that the options ask for. Raises ValueError for an unknown optimizer."""
    from parity.cases.suite import Selection
    from parity.measure.optimizers import OPTIMIZERS

    unknown = [name for name in options.trajectory if name not in OPTIMIZERS]
    if unknown:
        raise ValueError(f"--trajectory {' '.join(unknown)}: choose from {', '.join(OPTIMIZERS)}")
    every = options.all
    return Selection(
        invariances=every or options.invariances,
        sweep=every or options.sweep,
        trajectories=tuple(dict.fromkeys(options.trajectory or (["adam"] if every else []))),
        steps=options.steps,
        fast=every or options.fast or options.matmul_precision is not None or options.device in ("gpu", "tpu"),
        matmul_precision=options.matmul_precision,
    )


def compare(options: argparse.Namespace, console: "Console") -> list["Report"]:
    """One report per case, in the order of the cases."""
    import jax

    from parity.cases import load_cases, select
    from parity.cases.suite import examine
    from parity.report.progress import StatusLine, each
    from parity.report.terminal import print_failure

    names, selection = select(options.names), selection_of(options)
    workers = options.workers or default_workers(len(names), options.device or jax.default_backend())
    common = {"device": options.device, "seed": options.seed}
    prepare = functools.partial(prepare_jax, options.device, eight=selection.invariances)
    remote = examine_in_processes(names, selection, **common, workers=workers, prepare=prepare)
    cases, reports = load_cases(), []
    with StatusLine() as line:
        for name, stage in each(names, line):
            report = next(remote) if workers > 1 else examine(cases[name][0], name, selection, **common, progress=stage)
            line.clear()
            print_failure(report, console)
            reports.append(report)
    return reports


def record_all(options: argparse.Namespace, console: "Console") -> int:
    """Record fixtures of all small models, or of the named ones; a name that no small model has is looked up as a case.

    Pairs whose Flax model cannot be rebuilt from a configuration are skipped and named.
    """
    from parity.cases import load_cases, matching, select
    from parity.cases.golden import GOLDEN
    from parity.cases.suite import pair_of
    from parity.golden.fixture import check_target
    from parity.golden.record import description, record
    from parity.report.progress import StatusLine, each

    if not options.record.is_dir():
        raise ValueError(f"--record {options.record}: this folder does not exist")
    cases = {name: make for name, (make, _) in load_cases().items()}
    select(options.names, GOLDEN | cases, "small model or case")
    makes = {} if options.names else GOLDEN
    for name in options.names:
        known = GOLDEN if matching(name, GOLDEN) else cases
        makes |= {one: known[one] for one in matching(name, known)}
    for name in makes:
        check_target(options.record / name)
    with StatusLine() as line:
        for name, _ in each(list(makes), line):
            pair = pair_of(makes[name], options.seed)
            if description(pair.flax) is None:
                reason = f"{type(pair.flax).__name__} is not a registered language model"
                line.clear()
                console.print(f"{name}: skipped, {reason}", markup=False, highlight=False)
                continue
            record(
                *(pair.torch, pair.inputs, options.record / name),
                flax_module=pair.flax,
                labels=pair.labels,
                zero_gradients=pair.zero_gradients,
                seed=options.seed,
                name=name,
            )
    n = len(list(options.record.glob("*.json")))
    console.print(f"{n} fixtures in {visible(str(options.record))}", highlight=False, markup=False)
    return 0


def replay_all(options: argparse.Namespace, console: "Console") -> list["Report"]:
    """One report per fixture of the folder, or per named fixture."""
    from parity.cases import select
    from parity.golden.fixture import SHIPPED, stems
    from parity.golden.replay import ABSENT, replay
    from parity.report.progress import StatusLine, each
    from parity.report.report import Report
    from parity.report.terminal import print_failure

    folder = SHIPPED if options.replay is True else options.replay
    found = {file.stem: file for file in stems(folder)}
    replayed = functools.partial(replay, None, device=options.device)
    reports = []
    with StatusLine() as line:
        for name, _ in each(select(options.names, found, "fixture"), line):
            report = Report.gathered(name, map(replayed, [found[name]]))
            line.clear()
            print_failure(report, console)
            for kind in [kind for kind, why in report.skipped.items() if report.passed and why == ABSENT]:
                console.print(f"{visible(name)}: {kind}: {ABSENT}", markup=False, highlight=False)
            reports.append(report)
    return reports
