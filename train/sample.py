"""Text out of a trained run.

python -m train.sample runs/rope --prompt "KING" --length 500 --temperature 0.8
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import tyro

from jaxmodels.generate import generate
from train import checkpoints
from train.command import one_line_errors

PROGRAM = "python -m train.sample"


@dataclasses.dataclass(frozen=True)
class Command:
    """Writes a prompt and its continuation by a trained run's model."""

    run: Annotated[Path, tyro.conf.Positional]
    """folder of the run"""
    prompt: str = "\n"
    """text to continue; its characters must be among those of the training text"""
    length: int = 500
    """characters to write"""
    temperature: float = 0.8
    """0 takes the most likely character each time; above it characters are drawn, the flatter the higher"""
    top_k: int | None = None
    """draw from so many most likely characters only"""
    top_p: float | None = None
    """draw from the fewest characters whose probabilities reach this"""
    seed: int = 0
    """of the draws"""


def main(arguments: Sequence[str]) -> None:
    """Prints prompt and continuation; raises ValueError for bad input."""
    command = tyro.cli(Command, args=arguments, prog=PROGRAM)
    model, vocabulary = checkpoints.load_model(command.run)
    ids = jnp.asarray(vocabulary.encode(command.prompt))[:, None]
    continuation = generate(
        model,
        ids,
        command.length,
        temperature=command.temperature,
        top_k=command.top_k,
        top_p=command.top_p,
        rng=jax.random.key(command.seed),
    )
    print(command.prompt + vocabulary.decode(continuation[:, 0]))


if __name__ == "__main__":
    with one_line_errors(PROGRAM):
        main(sys.argv[1:])
