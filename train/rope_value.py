"""Addition, written out digit by digit: can a small model with rotary values (RoPER) learn it?

    python -m train.rope_value                            # --attention rotary for queries and keys alone
    python -m train.rope_value --preset original          # the original experiment's sizes

A problem is a question, its sum from the lowest digit up, and the answer, as in

    ?x=18+5; 8e0+5e0+0e0==13e0 1e1+0e1+1e1==2e1 x==23

Sequences are such problems, one after the other, generated on demand. The score is the share of 64 new questions whose
answer, written greedily after the question, is right.

Hardware   2 CPU cores, which a test suite and other programs were using too; float32
Time       20 min by the clock, 12 min of CPU time over both cores
Training   2000 steps of the preset small; seed 0
Result     right answers of 64: 51 after 500 steps, 63 after 1000, 64 after 1500 and after 2000
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import grain
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from jaxmodels.generate import generate
from jaxmodels.process.distributed import to_host
from jaxmodels.text import CharVocabulary, Vocabulary
from jaxmodels.training.config import TransformerConfig
from jaxmodels.training.data import Example, Task
from jaxmodels.training.experiment import Experiment, Interrupted, check_unchanged, never
from jaxmodels.training.runs.folder import saved_config
from jaxmodels.training.script import run_script
from jaxmodels.transformer import AutoregressiveTransformer

CHARACTERS = "0123456789xe =\n?+;"
VOCABULARY = CharVocabulary(CHARACTERS)
QUESTIONS, AT_A_TIME = 64, 16
VALIDATION = 64  # sequences
MOST_DIGITS = 18  # of numbers of 64 bits
UNNAMED_CHARACTERS = 2**22  # of the held-out sequences, if a run's files alone name their length


def problem(a: int, b: int) -> str:
    """One line: a question with its working and its answer."""
    steps, carry, place = [], 0, 0
    x, y = a, b
    while x or y or carry:
        total = x % 10 + y % 10 + carry
        steps.append(f"{x % 10}e{place}+{y % 10}e{place}+{carry}e{place}=={total}e{place}")
        x, y, carry, place = x // 10, y // 10, total // 10, place + 1
    return f"{question(a, b)} {' '.join(steps)} x=={a + b}\n"


def question(a: int, b: int) -> str:
    return f"?x={a}+{b};"


def draw(digits: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw two numbers of 1 to `digits` digits. Lengths are uniform; otherwise nearly all would have `digits`."""
    a, b = (int(rng.integers(1, 10 ** int(rng.integers(1, digits + 1)))) for _ in range(2))
    return a, b


def sequence(digits: int, seq_len: int, rng: np.random.Generator) -> Example:
    """Concatenate random problems, cut to seq_len + 1 characters."""
    text = ""
    while len(text) <= seq_len:
        text += problem(*draw(digits, rng))
    return {"tokens": VOCABULARY.encode(text[: seq_len + 1])}


def answer(
    model: Any,
    questions: Sequence[tuple[int, int]],
    length: int,
    interrupted: Interrupted = never,
) -> list[str]:
    """Continue each question greedily, to the end of the line or for `length` characters.

    Answers fewer questions if interrupted() between two batches of them.
    """
    prompts = [VOCABULARY.encode(question(*pair)) for pair in questions]
    width = max(map(len, prompts))
    start = np.array([width - len(prompt) for prompt in prompts])  # left padding
    ids = np.stack([np.pad(prompt, (n, 0)) for prompt, n in zip(prompts, start, strict=True)], axis=1)
    end = CHARACTERS.index("\n")
    found: list[str] = []
    while len(found) < len(questions) and not interrupted():
        some = slice(len(found), len(found) + AT_A_TIME)
        prompt, padding = jnp.asarray(ids[:, some]), jnp.asarray(start[some])
        written = to_host(generate(model, prompt, length, stop_tokens=(end,), start=padding))
        found += [VOCABULARY.decode(column).partition("\n")[0] for column in written.T]
    return found


@dataclasses.dataclass(frozen=True)
class Config(TransformerConfig):
    """Hyperparameters of a run."""

    PRESETS = ("small", "original")

    text: tyro.conf.Suppress[str] = "arithmetic"
    digits: int = 3
    """digits of the largest numbers to add"""
    attention: Literal["rotary", "rotary_value"] = "rotary_value"
    """rotary: rotate queries and keys by their positions; rotary_value: values too (RoPER)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.digits > MOST_DIGITS:
            raise ValueError(f"digits={self.digits} must be at most {MOST_DIGITS}")

    def positive(self) -> list[str]:
        return [*super().positive(), "digits"]

    def unused(self) -> dict[str, str]:
        return super().unused() | {"text_field": "the examples are generated"}

    @classmethod
    def small(cls) -> "Config":
        """Minutes on two CPU cores."""
        return cls(schedule="constant", learning_rate=1e-3)

    @classmethod
    def original(cls) -> "Config":
        """The sizes of the original experiment, 20 epochs of 4096 sequences, for an accelerator."""
        epoch = 4096 // 16
        return cls(
            digits=7,
            n_layers=6,
            seq_len=512,
            batch_size=16,
            schedule="constant",
            learning_rate=2.5e-4,
            steps=20 * epoch,
            every=epoch,
        )


class RopeValue(Experiment[Config]):
    config_class = Config

    def model(self, n_vocab: int) -> AutoregressiveTransformer:
        c = self.config
        sizes = (c.d_model, c.heads, c.d_ff, c.n_layers)
        return AutoregressiveTransformer(n_vocab, *sizes, c.attention, c.dropout, rngs=nnx.Rngs(c.seed))

    def task(self) -> Task:
        """Endless problems, and held-out ones from another generator.

        Raises ValueError if a run's files alone name a length that would take long to write.
        """
        length = self.config.seq_len
        if "seq_len" in self.unnamed and VALIDATION * length > UNNAMED_CHARACTERS:
            raise ValueError(
                f"seq_len={length:,} of the run must be at most {UNNAMED_CHARACTERS // VALIDATION:,}; if you trust it, "
                f"name it yourself: --seq-len {length}"
            )
        digits = self.config.digits
        make = functools.partial(sequence, digits, self.config.seq_len)
        train = grain.MapDataset.range(1).seed(self.config.seed).repeat().random_map(lambda _, rng: make(rng))
        held_out = [make(np.random.default_rng([1, i])) for i in range(VALIDATION)]
        sha256 = hashlib.sha256(b"".join(example["tokens"].tobytes() for example in held_out)).hexdigest()
        about = f"addition of numbers of up to {digits} digits, {len(VOCABULARY)} different characters"
        return Task(train, held_out, VOCABULARY, sha256, about)

    def held_out(self, run: Path, vocabulary: Vocabulary, sha256: str) -> Sequence[Example]:
        task, as_trained = self.task(), saved_config(RopeValue, run)
        checked = task
        if self.config.seq_len != as_trained.seq_len:  # `evaluate --seq-len` gives other lengths
            trained = RopeValue(as_trained)
            trained.unnamed = frozenset({"seq_len"})
            checked = trained.task()
        check_unchanged(f"digits={self.config.digits}", run, now=checked.sha256, then=sha256)
        return task.validation

    def report(self, model: Any, task: Task, interrupted: Interrupted) -> tuple[str, dict[str, float]]:
        """First three answers, and the share of right ones (only if all questions were answered)."""
        rng = np.random.default_rng(2)
        questions = [draw(self.config.digits, rng) for _ in range(QUESTIONS)]
        largest = 10**self.config.digits - 1
        found = answer(model, questions, len(problem(largest, largest)), interrupted)
        answered = list(zip(questions, found, strict=False))
        right = sum(text.rpartition("x==")[2] == str(a + b) for (a, b), text in answered)
        first = [question(*pair) + text for pair, text in answered[:3]]
        score = {"score": right / QUESTIONS} if len(found) == QUESTIONS else {}
        return "\n".join([f"{right} of {len(found)} answers right, such as", *first]), score


EXPERIMENT = RopeValue

if __name__ == "__main__":
    run_script(RopeValue, "python -m train.rope_value")
