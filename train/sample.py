"""Text out of a trained run.

python -m train.sample runs/rope --prompt "KING" --length 500 --temperature 0.8
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
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
    prompt: str = "The "
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
    continuation = continue_text(
        model,
        vocabulary.encode(command.prompt),
        command.length,
        checkpoints.read_about(command.run)["config"]["seq_len"],
        temperature=command.temperature,
        top_k=command.top_k,
        top_p=command.top_p,
        seed=command.seed,
    )
    print(command.prompt + vocabulary.decode(continuation))


def continue_text(
    model: Any, ids: np.ndarray, length: int, seq_len: int, *, temperature: float = 0.0, seed: int = 0, **choice: Any
) -> np.ndarray:
    """The next `length` tokens of a text: ids int [n] -> int32 [length], greedy at temperature 0.

    Beyond the seq_len positions that a model was trained on its text falls apart. So it is written in pieces that end
    there, each from the last seq_len // 2 tokens of what is there by then. Raises ValueError as `generate` does.
    """
    if length < 1:
        raise ValueError(f"length={length} must be at least 1")
    written = ids
    while len(written) < len(ids) + length:
        context = written[-max(1, seq_len // 2) :]
        n = min(max(1, seq_len - len(context)), length)
        rng = jax.random.fold_in(jax.random.key(seed), len(written))
        piece = generate(model, jnp.asarray(context)[:, None], n, temperature=temperature, rng=rng, **choice)
        written = np.concatenate([written, piece[:, 0]])
    return written[len(ids) : len(ids) + length]


if __name__ == "__main__":
    with one_line_errors(PROGRAM):
        main(sys.argv[1:])
