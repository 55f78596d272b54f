"""Text out of a trained run.

python -m train.sample runs/rope --prompt "KING" --length 500 --temperature 0.8
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxmodels.generate import generate
from jaxmodels.retro.retrieval.examples import retrieving
from jaxmodels.text import Vocabulary, load_vocabulary
from jaxmodels.training.checkpoints import latest_model
from jaxmodels.training.config import read_about

PROGRAM = "python -m train.sample"


@dataclasses.dataclass(frozen=True)
class Command:
    """Writes a prompt and its continuation by a trained run's model."""

    run: Annotated[Path, tyro.conf.Positional]
    """folder of the run"""
    prompt: str | None = None
    """text to continue; its characters must be among those of the training text; none: "The ", or a new line, or the
    vocabulary's first token, the first of these that the model knows"""
    length: int = 500
    """tokens to write: characters, mostly"""
    temperature: float = 0.8
    """0 takes the most likely token each time; above it tokens are drawn, the flatter the higher"""
    top_k: int | None = None
    """draw from so many most likely tokens only"""
    top_p: float | None = None
    """draw from the fewest tokens whose probabilities reach this"""
    seed: int = 0
    """of the draws"""


def main(arguments: Sequence[str]) -> None:
    """Prints prompt and continuation; raises ValueError for bad input."""
    command = tyro.cli(Command, args=arguments, prog=PROGRAM)
    settings = read_about(command.run)["config"]
    vocabulary = load_vocabulary(command.run / "vocabulary.json")
    model = retrieving(latest_model(command.run)[0], command.run, settings)
    prompt = default_prompt(vocabulary) if command.prompt is None else command.prompt
    continuation = continue_text(
        model,
        vocabulary.encode(prompt),
        command.length,
        settings["seq_len"],
        temperature=command.temperature,
        top_k=command.top_k,
        top_p=command.top_p,
        seed=command.seed,
        n_tokens=len(vocabulary),
    )
    print(prompt + vocabulary.decode(continuation))


def default_prompt(vocabulary: Vocabulary) -> str:
    """The beginning of a text, in what a vocabulary has."""
    for prompt in ("The ", "\n"):
        with contextlib.suppress(ValueError):
            vocabulary.encode(prompt)
            return prompt
    return vocabulary.decode(np.zeros(1, np.int32))


def continue_text(
    model: Any,
    ids: np.ndarray,
    length: int,
    seq_len: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    interrupted: Callable[[], bool] = lambda: False,
    **choice: Any,
) -> np.ndarray:
    """The next `length` tokens of a text: ids int [n] -> int32 [length], greedy at temperature 0.

    Beyond the seq_len positions that a model was trained on its text falls apart. So it is written in pieces that end
    there, each from the last seq_len // 2 tokens of what is there by then. Fewer come back where interrupted() says so
    between two pieces. Raises ValueError as `generate` does.
    """
    if length < 1:
        raise ValueError(f"length={length} must be at least 1")
    axis = model.sequence_axis
    written = ids
    while len(written) < len(ids) + length and not interrupted():
        context = written[-max(1, seq_len // 2) :]
        n = min(max(1, seq_len - len(context)), length)
        rng = jax.random.fold_in(jax.random.key(seed), len(written))
        prompt = jnp.expand_dims(jnp.asarray(context), 1 - axis)
        piece = generate(model, prompt, n, temperature=temperature, rng=rng, **choice)
        written = np.concatenate([written, whole(piece).squeeze(1 - axis)])
    return written[len(ids) : len(ids) + length]


def whole(array: jax.Array) -> np.ndarray:
    """An array on the host, which may lie in parts on the devices of several processes."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    mesh = array.sharding.mesh  # type: ignore[attr-defined]
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return np.asarray(jax.jit(lambda a: a, out_shardings=everywhere)(array))
