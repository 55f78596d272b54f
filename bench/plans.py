"""`make plans`: training steps compiled for TPU slices without a TPU, and docs/plans.md with their figures.

Compiles one step after the other, up to its code, and appends each as a JSON line to runs/plans/plans.jsonl; a run that
was cut goes on. Steps of another version of jax or libtpu, or whose flags changed, are compiled again, and with --again
all. The page is written after each step. All steps take an hour on one core. Needs libtpu:
pip install 'jaxmodels[train,plan]'.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench.plans_page import page
from jaxmodels.io.atomic import atomic_file
from jaxmodels.neox.config import PRESETS
from jaxmodels.sharding import make_mesh
from jaxmodels.training.experiment import EXPERIMENTS, experiment_class
from jaxmodels.training.plan import command
from jaxmodels.training.plan.table import GIB, DoesNotFit, make_plan
from jaxmodels.training.plan.topology import HBM, SLICES, chips, parse_topology, topology_devices
from parity.report.stamp import version

ROOT = Path(__file__).parents[1]
STORE = ROOT / "runs" / "plans" / "plans.jsonl"
PAGE = ROOT / "docs" / "plans.md"
GENERATIONS = ("v5e", "v6e", "v4", "v5p")
PYTHIA = tuple(name for name in PRESETS if name not in ("pythia_14m", "pythia_31m", "neox_20b"))
# Chips of the slice on which each size is planned, enough for each generation.
CHIPS = {"pythia_70m": 4, "pythia_160m": 4, "pythia_410m": 4, "pythia_1b": 4, "pythia_1_4b": 8, "pythia_2_8b": 8}
LARGER = 32  # chips for larger ones
SEQUENCES = 4  # per chip
LONG = (8192, 32_768)  # tokens of the long sequences, one per chip
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Step:
    """A step to compile: the table that it belongs to, its name there, and the planner's arguments.

    sequences: per chip.
    """

    table: str
    name: str
    topology: str
    arguments: tuple[str, ...]
    sequences: float

    @property
    def key(self) -> str:
        return " ".join(self.arguments)


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(prog="python -m bench.plans", description=__doc__)
    add = arguments.add_argument
    add("--only", default="", metavar="TEXT", help="only steps whose command contains TEXT")
    add("--minutes", type=float, metavar="N", help="begin no further step after N minutes")
    add("--again", action="store_true", help="compile steps that are there again: the code of the step changed")
    add("--page", action="store_true", help="write the page from the steps that are there")
    return arguments.parse_args()


def smallest(generation: str, least: int = 1) -> str:
    """Smallest slice of a generation with at least so many chips."""
    return next(f"{generation}:{shape}" for shape in sorted(SLICES[generation], key=chips) if chips(shape) >= least)


def scripts(generation: str) -> Iterator[Step]:
    """Each preset of each script, on the smallest slice, which divides the batch."""
    for name in EXPERIMENTS:
        kind = experiment_class(name)
        for preset in kind.config_class.PRESETS:
            if preset in ("finetune", "pythia_70m", "neox_20b"):
                continue  # needs a checkpoint, or is in another table
            topology = smallest(generation)
            flags: tuple[str, ...] = (name, "--preset", preset, "--topology", topology)
            n = chips(topology.partition(":")[2])
            batch = kind.config_class.of_preset(preset).batch_size
            if batch % n:
                batch = -(-batch // n) * n
                flags = (*flags, "--batch-size", str(batch))
            yield Step("scripts", f"{name} {preset}", topology, flags, batch / n)


def language_model(
    size: str, topology: str, per_chip: int, table: str, mesh: str = "", length: int | None = None
) -> Step:
    """A size of GPT-NeoX with AdamW, float32 parameters, bfloat16 computation and rematerialized layers.

    length: of the sequences, default 2048; it is part of the step's name.
    """
    config, n = PRESETS[size](), chips(parse_topology(topology)[1])
    sizes = {"d-model": config.n_hidden, "heads": config.n_heads, "d-ff": config.d_ff, "n-layers": config.n_layers}
    preset = ("--preset", "neox_20b" if size == "neox_20b" else "pythia_70m")
    own = [] if size in ("neox_20b", "pythia_70m") else [word for k, v in sizes.items() for word in (f"--{k}", str(v))]
    vocab = () if size in ("neox_20b", "pythia_70m") else ("--n-vocab", str(config.n_vocab))
    place = ("--topology", topology, "--mesh", mesh or f"fsdp={n}", "--batch-size", str(n * per_chip))
    tokens = () if length is None else ("--seq-len", str(length))
    name = size if length is None else f"{size}, {length:,} tokens"
    return Step(table, name, topology, ("neox", *preset, *own, *vocab, *tokens, "--remat", "layers", *place), per_chip)


def pythia(generation: str) -> Iterator[Step]:
    for size in PYTHIA:
        topology = smallest(generation, CHIPS.get(size, LARGER))
        yield language_model(size, topology, SEQUENCES, "pythia")


def steps(generation: str) -> Iterator[Step]:
    """Steps of a generation, but those of neox_20b that depend on one another (`largest`); small ones first."""
    yield from pythia(generation)
    yield from scripts(generation)
    if generation == "v5e":
        yield language_model("neox_20b", "v5e:8x8", 1, "neox_20b")
        yield language_model("neox_20b", "v5e:16x16", 1, "neox_20b", "fsdp=32,tensor=8")
        for length in LONG:
            yield language_model("pythia_1_4b", "v5e:4x4", 1, "context", length=length)


class Store:
    """Compiled steps as JSON lines, by the planner's arguments and the versions."""

    def __init__(self, file: Path, only: str = "", deadline: float = float("inf"), again: bool = False):
        self.file, self.only, self.deadline = file, only, deadline
        self.versions = {name: version(name) for name in ("jax", "libtpu")}
        lines = file.read_text().splitlines() if file.exists() else []
        rows = [json.loads(line) for line in lines]
        rows = [row for row in rows if row["versions"] == self.versions and not (again and only in row["key"])]
        self.rows: dict[str, Row] = {row["key"]: row for row in rows}

    def of(self, step: Step) -> Row | None:
        """Figures of a step, compiled now if it was not; None if it was not and is not asked for."""
        if step.key in self.rows:
            return self.rows[step.key]
        if self.only not in step.key or time.monotonic() > self.deadline:
            return None
        print(f"{step.key} …", end=" ", flush=True)
        row = compiled(step)
        print(f"{row['peak'] / 2**30:.3g} GiB" if "peak" in row else f"needs {row['need']:.4g} GiB", flush=True)
        self.rows[step.key] = row | {"versions": self.versions}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.file) as file:
            file.write_text("".join(json.dumps(row) + "\n" for row in self.rows.values()))
        PAGE.write_text(page(list(self.rows.values()), missing(self), maxtext()))
        return self.rows[step.key]


def compiled(step: Step) -> Row:
    """Compile a step in a process of its own, up to its code; its figures, or what it needs if it does not fit."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_row, args=(step, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise ValueError(f"the planner ended without a result: python -m train.plan {step.key}") from None
    finally:
        process.join()


def send_row(step: Step, sender: Connection) -> None:
    """Send a step's figures and end the process, in which the compiler goes on to generate code."""
    sender.send(figures(step))
    os._exit(0)


def figures(step: Step) -> Row:
    """Figures of a step; its end of the process is the caller's, see `make_plan`."""
    experiment, options = command.parse(step.arguments, "make plans")
    generation, _ = parse_topology(step.topology)
    mesh = make_mesh(options.mesh, topology_devices(step.topology))
    n_vocab = experiment.planned_vocab if options.n_vocab is None else options.n_vocab
    program = experiment.program(n_vocab, mesh)
    config = experiment.config
    row: Row = {
        "key": step.key,
        "table": step.table,
        "name": step.name,
        "topology": step.topology,
        "mesh": options.mesh,
        "sequences": step.sequences,
        "parameters": program.parameters,
        "tokens": config.batch_size * config.seq_len,
    }
    began = time.process_time()
    try:
        found = make_plan(program, experiment.abstract_batch(), generation, n_vocab, generate_code=False)
    except DoesNotFit as error:
        return row | {"need": error.need, "limit": error.limit}
    row["processor_seconds"] = time.process_time() - began
    bound, least = found.bound
    return row | dataclasses.asdict(found) | {"bound": bound, "least": least, "chips": mesh.size}


def largest(store: Store, generation: str) -> None:
    """Find the smallest slice that holds neox_20b with AdamW, and the most sequences per chip there."""
    for topology in slices_for_20b(generation):
        row = store.of(language_model("neox_20b", topology, 1, "neox_20b"))
        if row is None:
            return
        if "peak" in row:
            most(store, topology)
            return


def slices_for_20b(generation: str) -> list[str]:
    """Slices whose memory holds the parameters and two moments of neox_20b in float32, by size."""
    state = 3 * 4 * PRESETS["neox_20b"]().parameters()
    shapes = [shape for shape in sorted(SLICES[generation], key=chips) if state / chips(shape) < HBM[generation] * GIB]
    return [f"{generation}:{shape}" for shape in shapes]


def most(store: Store, topology: str) -> None:
    """Find the most sequences per chip of neox_20b: from the difference of one and two, then one by one."""

    def fits(n: int) -> bool | None:
        row = store.of(language_model("neox_20b", topology, n, "neox_20b"))
        return None if row is None else "peak" in row

    one, two = (store.of(language_model("neox_20b", topology, n, "neox_20b")) for n in (1, 2))
    if one is None or two is None or "peak" not in two:
        return
    n = max(2, 1 + int((one["limit"] - one["peak"]) / max(1, two["peak"] - one["peak"])))
    while fits(n) is False:
        n -= 1
    while fits(n + 1):
        n += 1


def missing(store: Store) -> list[tuple[str, str]]:
    """Slice and name of each step that is not compiled; of those of neox_20b, the first of each generation."""
    found = [step for generation in GENERATIONS for step in steps(generation)]
    found += [language_model("neox_20b", slices_for_20b(each)[0], 1, "neox_20b") for each in GENERATIONS]
    return [(step.topology, step.name) for step in found if step.key not in store.rows]


def maxtext() -> list[Row]:
    """Figures that bench.maxtext stored."""
    file = STORE.with_name("maxtext.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def main() -> None:
    options = parse()
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    store = Store(STORE, options.only, 0 if options.page else deadline, options.again)
    for generation in GENERATIONS:
        for step in steps(generation):
            store.of(step)
        largest(store, generation)
    PAGE.write_text(page(list(store.rows.values()), missing(store), maxtext()))
    print(f"{len(store.rows)} steps in {STORE}; {PAGE}")


if __name__ == "__main__":
    main()
