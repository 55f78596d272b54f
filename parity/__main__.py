"""`python -m parity`: every case, a table, a non-zero exit where any differs."""

import argparse
import json
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

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


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog="python -m parity",
        description="Runs Flax models against their PyTorch twins and says how closely they agree. "
        "Without names, all cases run. Exits 1 where any case differs.",
    )
    arguments.add_argument("names", nargs="*", metavar="NAME", help="a case (rope.attention) or a system (rope)")
    arguments.add_argument("--device", choices=["cpu", "gpu", "tpu"], help="where Flax runs (default: JAX's default)")
    arguments.add_argument("--list", action="store_true", help="name the cases and exit")
    arguments.add_argument("--seed", type=int, default=0, help="seed of weights, inputs and targets (default 0)")
    arguments.add_argument("--json", type=Path, metavar="FILE", help="write all readings as JSON")
    arguments.add_argument("--report", type=Path, metavar="FILE.html", help="write one self-contained page")
    return arguments


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    console = Console()
    if not console.is_terminal:  # a file has no width to fit: a whole table is worth more than one folded to 80
        console = Console(width=184)
    if options.device == "cpu":  # before JAX starts, so that it looks for no other
        import jax

        jax.config.update("jax_platforms", "cpu")
    from parity.cases import load_cases, select

    try:
        for file in filter(None, (options.json, options.report)):
            if not file.absolute().parent.is_dir():
                raise ValueError(f"{file} cannot be written: there is no folder {file.absolute().parent}")
        names = select(options.names)
        if options.list:
            for name in names:
                console.print(f"{name:40} {load_cases()[name][1]}", highlight=False)
            return 0
        reports = run(names, options.device, options.seed, console)
    except (ValueError, RuntimeError) as error:
        print(f"parity: {error}", file=sys.stderr)
        return 2
    summary(reports, console)
    if options.json:
        write_beside(options.json, json.dumps([report.to_dict() for report in reports], indent=2) + "\n")
    if options.report:
        from parity.page import page

        write_beside(options.report, page(reports))
    return 0 if all(report.passed for report in reports) else 1


def run(names: list[str], device: str | None, seed: int, console: Console) -> list:
    """One report per case, with a progress bar."""
    import numpy as np
    import torch

    from parity import check
    from parity.cases import load_cases

    cases, reports = load_cases(), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            torch.manual_seed(seed)
            pair = cases[name][0](np.random.default_rng(seed))

            def stage(text: str, name: str = name) -> None:
                progress.update(task, description=f"{name}: {text}")

            reports.append(
                check(
                    pair.torch,
                    pair.flax,
                    pair.inputs,
                    labels=pair.labels,
                    zero_gradients=pair.zero_gradients,
                    half=pair.half,
                    steps=pair.steps,
                    device=device,
                    seed=seed,
                    name=name,
                    progress=stage,
                )
            )
            progress.advance(task)
            if not reports[-1].passed:
                progress.console.print(str(reports[-1]), style="red", markup=False, highlight=False)
    return reports


def summary(reports: list, console: Console) -> None:
    """The table, what its numbers mean, and the stamp."""
    shown = [c for c in COLUMNS if any(report.value(*c[1:]) is not None for report in reports)]
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("case", no_wrap=True)
    for heading, _, precision in shown:
        table.add_column(f"{precision}\n{heading}", justify="right")
    table.add_column("\nresult")
    table.add_column("\ns", justify="right")
    for report in reports:
        cells = [cell(report, kind, precision) for _, kind, precision in shown]
        verdict = "[green]agrees[/]" if report.passed else "[red]DIFFERS[/]"
        table.add_row(report.name, *cells, verdict, f"{report.seconds:.1f}")
    console.print(table)
    passed = sum(report.passed for report in reports)
    console.print(f"{passed} of {len(reports)} cases agree. {LEGEND}", highlight=False, soft_wrap=True)
    stamp = ", ".join(f"{key} {value}" for key, value in reports[0].environment.items())
    console.print(stamp, style="dim", highlight=False, soft_wrap=True)


def cell(report, kind: str, precision: str) -> str:
    found = next((c for c in report.checks if (c.kind, c.precision) == (kind, precision)), None)
    if found is None:
        return "[dim]–[/]"
    text = {"float64": f"{found.value:.0e}", "bits": f"{found.value:.0f}"}.get(precision, f"{found.value:.2f}×")
    return text if found.passed else f"[red]{text}[/]"


def write_beside(file: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    beside = file.with_name(f".{file.name}.writing")
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)


if __name__ == "__main__":
    sys.exit(main())
