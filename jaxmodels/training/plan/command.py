"""Memory and time of a training step on a TPU slice, computed on a machine without one.

    python -m train.plan rope --preset original --topology v5e:2x4 --mesh fsdp=4,tensor=2 --batch-size 64
    python -m train.plan my_project.experiment --topology v5e:2x4

Compiles the same step that training runs, for the topology, and reads memory and communication from the compiled
program. Needs libtpu: pip install 'jaxmodels[train,plan]'.
"""

import argparse
import dataclasses
import math
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from jaxmodels.process import programs
from jaxmodels.process.arguments import Parser
from jaxmodels.process.streams import say
from jaxmodels.sharding import make_mesh
from jaxmodels.training.config import MOST_SIZE, Config
from jaxmodels.training.experiment import EXPERIMENTS, Experiment, experiment_class
from jaxmodels.training.plan.table import COMPILER, DoesNotFit, make_plan, table
from jaxmodels.training.plan.topology import parse_topology, topology_devices
from jaxmodels.training.script import parse_flags, peek, refuse_unused, with_presets

PROGRAM = "python -m train.plan"
EXAMPLES = """\
Experiments of a checkout: {names}. Any other is given by its module.
`{prog} EXPERIMENT --help` lists the options.

examples:
  {prog} rope --preset original --topology v5e:2x4 --mesh fsdp=4,tensor=2 --batch-size 64
  {prog} my_project.experiment --topology v5e:2x4
"""


@dataclasses.dataclass(frozen=True)
class Command:
    """Compile an experiment's training step for a TPU topology and print its memory and time."""

    config: Config
    preset: str
    topology: str = "v5e:2x4"
    """TPU generation and chips, v5e:1x1 to v5e:16x16, v5p:2x2x1, v6e:8x8, v4:2x2x1, …, or an accelerator's name:
    v5litepod-8, v5e-8, v6e-8; v4-8 and v5p-8 count TensorCores, two per chip"""
    mesh: str = ""
    """devices along the axes data, fsdp and tensor, as in training; data takes the remaining ones"""
    generate_code: bool = False
    """let the compiler finish, which takes minutes; what is printed is known once it has placed the buffers"""
    n_vocab: int | None = None
    """vocabulary size, which the text would determine; if omitted: the experiment's own, which is 256 unless it has
    another (50432 for the published sizes of neox)"""


def overview(prog: str) -> argparse.ArgumentParser:
    """Parser of `--help` before an experiment is named, whose flags depend on it."""
    arguments = Parser(
        prog=prog,
        usage=f"{prog} [-h] EXPERIMENT …",
        description="Compile a training step for a TPU slice, without a TPU, and print its memory and speed.",
        epilog=EXAMPLES.format(prog=prog, names=", ".join(EXPERIMENTS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument("experiment", metavar="EXPERIMENT", help="name, module or .py file of an experiment")
    return arguments


def parse(arguments: Sequence[str], prog: str = PROGRAM) -> tuple[Experiment[Any], Command]:
    """Parse a command line; raises ValueError for an unknown experiment or preset."""
    if arguments[:1] in (["-h"], ["--help"]):
        overview(prog).parse_args(arguments[:1])
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(
            f"experiment is missing: {prog} EXPERIMENT --help; EXPERIMENT is one of {', '.join(EXPERIMENTS)}, "
            "or a module such as my_project.experiment, or its file"
        )
    kind = experiment_class(arguments[0])
    preset = peek(arguments, "--preset") or kind.config_class.PRESETS[0]
    defaults = (kind.config_class.of_preset(preset), preset)
    command = parse_flags(with_presets(Command, kind), defaults, arguments[1:], f"{prog} {arguments[0]}")
    refuse_unused(command.config, arguments[1:])
    return kind(command.config), command


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Run the command and return its exit code, 1 if the step does not fit; `prog` is the command as typed."""
    arguments = sys.argv[1:] if argv is None else argv

    def planned() -> int:
        try:
            plan(arguments, prog)
        except DoesNotFit as error:
            say(f"{prog}: {error}")
            return 1
        return 0

    code = programs.run(planned, prog)
    if any(thread.name == COMPILER for thread in threading.enumerate()):  # it would hold up the exit
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def plan(arguments: Sequence[str], prog: str = PROGRAM) -> None:
    """Print the table; raises ValueError for bad input, and DoesNotFit with a suggestion."""
    experiment, command = parse(arguments, prog)
    config, (generation, _) = experiment.config, parse_topology(command.topology)
    n_vocab = experiment.planned_vocab if command.n_vocab is None else command.n_vocab
    if not 1 <= n_vocab <= MOST_SIZE:
        raise ValueError(f"n_vocab={n_vocab} must be at least 1 and at most {MOST_SIZE:,}")
    mesh = make_mesh(command.mesh, topology_devices(command.topology))
    program = experiment.program(n_vocab, mesh)
    console = Console(highlight=False, markup=False, width=140)
    parameters = sum(math.prod(leaf.shape) for leaf in program.abstract_state().params.values())
    console.print(
        f"{arguments[0]}, preset {command.preset}: {parameters:,} parameters; {config.batch_size} sequences of "
        f"{config.seq_len} tokens; compute {config.compute_dtype}, parameters {config.param_dtype}, "
        f"remat {config.remat}, accumulate {config.accumulate}"
    )
    found = make_plan(program, experiment.abstract_batch(), generation, n_vocab, generate_code=command.generate_code)
    console.print(table(found, mesh, config.batch_size * config.seq_len))
    console.print("fits")
