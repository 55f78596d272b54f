"""Text from a trained run: `jaxmodels sample`, or `python -m train.sample` in a checkout.

The same as `jaxmodels generate`, with defaults for models that were trained from scratch.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from jaxmodels.convert.open import open_source
from jaxmodels.generate.command import add_settings, check, continue_prompts
from jaxmodels.io.bounded import errors_naming
from jaxmodels.process import programs
from jaxmodels.process.arguments import Parser
from jaxmodels.process.failures import memory_naming
from jaxmodels.process.paths import local
from jaxmodels.training.runs.folder import read_about

PROGRAM = "python -m train.sample"
EXAMPLES = """\
examples:
  jaxmodels sample runs/rope --prompt "KING" --length 500 --temperature 0.8
"""


def parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    arguments = Parser(
        prog=prog,
        description="Print a prompt and its continuation by the model of a run's latest checkpoint.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = arguments.add_argument
    add("run", type=Path, metavar="RUN", help="folder of the run")
    add(
        "--prompt",
        help="text to continue, in the training text's characters (default: the first of 'The ', a newline, and the "
        "vocabulary's first token that the vocabulary can encode)",
    )
    add("--length", type=int, default=500, metavar="N", help="tokens to generate (default: 500)")
    add(
        "--temperature",
        type=float,
        default=0.8,
        help="0: take the most likely token; above 0: sampling temperature (default: 0.8)",
    )
    add_settings(arguments)
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Run the command and return its exit code; `prog` is the command as typed."""
    options = parser(prog).parse_args(argv)
    return programs.run(lambda: memory_naming(options.run)(sample)(options), prog)


def sample(options: argparse.Namespace) -> None:
    """Print a prompt and its continuation, from the flags of `parser`; raises ValueError for bad input."""
    options.run = local(options.run, "RUN")
    if options.length < 1:
        raise ValueError(f"length={options.length} must be at least 1")
    given = vars(options) | {
        "max_new_tokens": options.length,
        "batch_size": 16,
        "tokenizer": None,
        "report": False,
    }
    options = argparse.Namespace(**given)
    check(options)
    read_about(options.run)  # raises if the folder holds no run
    with errors_naming(options.run):
        continue_prompts(open_source(options.run), [options.prompt], options)
