"""Text from a trained run: `jaxmodels sample`, or `python -m train.sample` in a checkout."""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxmodels.process import programs
from jaxmodels.text import Vocabulary
from jaxmodels.training.experiment import continue_text
from jaxmodels.training.run import open_run

PROGRAM = "python -m train.sample"
EXAMPLES = """\
examples:
  jaxmodels sample runs/rope --prompt "KING" --length 500 --temperature 0.8
"""


def parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
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
    add("--length", type=int, default=500, metavar="N", help="tokens to generate (default 500)")
    add(
        "--temperature",
        type=float,
        default=0.8,
        help="0: take the most likely token; above 0: sampling temperature (default 0.8)",
    )
    add("--top-k", type=int, metavar="K", help="draw only from the K most likely tokens (default: from all)")
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="draw only from the smallest set of tokens with total probability P (default: from all)",
    )
    add("--seed", type=int, default=0, help="seed of the draws (default 0)")
    add(
        "--experiment",
        metavar="MODULE",
        help="module of the run's experiment, such as my_project.experiment; it is imported, and registers its model",
    )
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Run the command and return its exit code; `prog` is the command as typed."""
    options = parser(prog).parse_args(argv)
    return programs.run(lambda: print(sample(options)), prog)


def sample(options: argparse.Namespace) -> str:
    """Generate a prompt's continuation, from the flags of `parser`; raises ValueError for bad input."""
    experiment, model, vocabulary = open_run(options.run, options.experiment)
    prompt = default_prompt(vocabulary) if options.prompt is None else options.prompt
    continuation = continue_text(
        experiment.generator(model, options.run),
        vocabulary.encode(prompt),
        options.length,
        experiment.config.seq_len,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        n_tokens=len(vocabulary),
    )
    return prompt + vocabulary.decode(continuation)


def default_prompt(vocabulary: Vocabulary) -> str:
    """Default prompt that a vocabulary can encode; see --prompt."""
    for prompt in ("The ", "\n"):
        with contextlib.suppress(ValueError):
            vocabulary.encode(prompt)
            return prompt
    return vocabulary.decode(np.zeros(1, np.int32))
