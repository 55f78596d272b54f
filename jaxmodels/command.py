"""The console command `jaxmodels`, also `python -m jaxmodels`.

Each subcommand is the `main(argv, prog)` of the module that implements it, which is imported only when it is called.
"""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

from jaxmodels import __version__
from jaxmodels.process.arguments import Parser
from jaxmodels.process.programs import end_at_ctrl_c, interrupt, run


class Command(NamedTuple):
    """A subcommand."""

    module: str  # with main(argv: Sequence[str], prog: str) -> int
    help: str
    first: tuple[str, ...] = ()  # arguments that precede the user's: the subcommand of the module's own parser


COMMANDS = {
    "convert": Command(
        "jaxmodels.convert.command", "convert checkpoints between PyTorch, GPT-NeoX, Hugging Face and Flax"
    ),
    "inspect": Command("jaxmodels.convert.command", "print what a checkpoint of any kind contains", ("inspect",)),
    "verify": Command("jaxmodels.convert.command", "compare two checkpoints bit for bit", ("verify",)),
    "quantize": Command(
        "jaxmodels.convert.command", "write a GPT-NeoX checkpoint with weights in 8 or 4 bits", ("quantize",)
    ),
    "generate": Command("jaxmodels.generate.command", "continue prompts with a model"),
    "neighbors": Command("jaxmodels.retro.retrieval.command", "print the nearest chunks of a RETRO index for a text"),
    "evaluate": Command(
        "jaxmodels.training.commands.evaluate", "loss, perplexity and bits per byte of a model on a text"
    ),
    "lm-eval": Command("jaxmodels.scoring.lm_eval", "tasks of lm-evaluation-harness, with lm-eval's own arguments"),
    "sample": Command("jaxmodels.training.commands.sample", "write text with the model of a training run"),
    "tokenize": Command("jaxmodels.training.tokenize", "encode a text once, for training"),
    "new": Command("jaxmodels.training.commands.new", "write a file to begin an experiment of one's own with"),
    "plot": Command("jaxmodels.training.commands.plot", "draw the loss curves of training runs"),
    "clean": Command("jaxmodels.io.clean", "list and remove what killed runs left behind"),
    "plan": Command("jaxmodels.training.plan.command", "compile a training step for a TPU slice: memory and speed"),
}


def parser(prog: str) -> argparse.ArgumentParser:
    """Parser of the options before a subcommand, with the text of --help."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()]
    arguments = Parser(
        prog=prog,
        usage=f"{prog} [-h] [--version] COMMAND …",
        description="Convert, inspect, evaluate and sample from Flax models.",
        epilog="\n".join(["commands:", *lines, "", f"`{prog} COMMAND --help` lists a command's arguments."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument("--version", action="version", version=f"jaxmodels {__version__}")
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = "jaxmodels") -> int:
    """Run a subcommand and return its exit code."""
    return run(lambda: dispatch(sys.argv[1:] if argv is None else argv, prog), prog)


def dispatch(argv: Sequence[str], prog: str) -> int:
    """Find the subcommand and call it; raises ValueError if it is missing or unknown."""
    if not argv or argv[0].startswith("-"):
        parser(prog).parse_args(argv)  # exits after --help, --version and unknown options
        raise ValueError(f"a command is required: {', '.join(COMMANDS)}")
    name, *rest = argv
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}; choose from {', '.join(COMMANDS)}")
    return call(name, rest, prog if COMMANDS[name].first else f"{prog} {name}")


def call(name: str, argv: Sequence[str], prog: str) -> int:
    """Run one subcommand as a program of its own and return its exit code.

    prog: the command as typed, for its help and errors, e.g. "python -m jaxmodels.convert".
    """

    def imported() -> int | None:
        prepare(name)
        command = COMMANDS[name]
        function: Callable[..., int | None] = import_quietly(command.module, prog).main
        return function([*command.first, *argv], prog=prog)

    return run(imported, prog)


def import_quietly(module: str, prog: str) -> ModuleType:
    """Import a module; Ctrl-C meanwhile ends the process with one line."""
    before = signal.getsignal(signal.SIGINT)
    if before is not interrupt:
        return importlib.import_module(module)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end_at_ctrl_c(prog)
    try:
        return importlib.import_module(module)
    finally:
        signal.signal(signal.SIGINT, before)


def prepare(name: str) -> None:
    """Set the process up for a subcommand, before it uses JAX."""
    if name in ("convert", "inspect", "verify", "quantize"):  # run on the CPU: another process may hold the accelerator
        import jax

        from jaxmodels.process.allocator import keep_freed_memory

        jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
        keep_freed_memory()
