"""Every kind of Synthesizer on one text, next to the attention that they replace and a character 4-gram model.

    python -m train.synthesizer --text tiny_shakespeare    # or a FILE; without --text: Python's own language reference
    python -m train.synthesizer --attention random+dense   # only one of them

Hardware   2 CPU cores, shared with test runs; float32
Time       79 min by the clock for all eight, 112 min of CPU time over both cores
Training   each kind 2000 steps of 16 sequences of 128 characters (4.1 epochs of tiny_shakespeare)
Result     tiny_shakespeare, seed 0, validation loss in nats per character over the same characters:
                                parameters    1000 steps    2000 steps
           factorized_random       710,721         1.776         1.636
           random+dense          1,073,733         1.774         1.642
           random+vanilla        1,072,197         1.854         1.659
           dense                   811,585         1.822         1.678
           random                  940,097         1.866         1.690
           factorized_dense        822,193         1.868         1.719
           vanilla                 810,049         2.043         1.755
           character 4-gram                                      1.774
           fixed_random            677,953         2.423         2.369
           fixed_random stays above the 4-gram, between a 2-gram (2.486) and a 3-gram (2.049): its attention weights
           are drawn once and not trained, so that no head can learn to attend to the preceding characters. The others
           are below it.

Each kind is a separate run, RUNS/KIND. The same command resumes where it was stopped, and prints finished runs again.
"""

import dataclasses
from collections.abc import Sequence

from flax import nnx
from rich.table import Table

from jaxmodels.training import script
from jaxmodels.training.config import TransformerConfig
from jaxmodels.training.experiment import Experiment
from jaxmodels.training.runs.folder import check_folder
from jaxmodels.training.script import Session, as_program, parse
from jaxmodels.training.signals import interruptible
from jaxmodels.training.trainer import Result
from jaxmodels.transformer import AutoregressiveTransformer

PROGRAM = "python -m train.synthesizer"
# The last one is the baseline that the others replace: dot products, without positions.
KINDS = (
    "dense",
    "random",
    "fixed_random",
    "factorized_dense",
    "factorized_random",
    "random+dense",
    "random+vanilla",
    "vanilla",
)


@dataclasses.dataclass(frozen=True)
class Config(TransformerConfig):
    """Hyperparameters of a run."""

    PRESETS = ("small", "original")

    warmup: int = 300
    """steps until the schedule's peak"""
    attention: str = "all"
    """a kind of SynthesizerAttention, or a sum such as random+dense; all: eight of them, one after the other"""

    @classmethod
    def small(cls) -> "Config":
        """Minutes per kind on two CPU cores."""
        return cls()

    @classmethod
    def original(cls) -> "Config":
        """The sizes of the original character experiments, for an accelerator."""
        return cls(heads=16, n_layers=6, seq_len=512, batch_size=4, steps=30_000, warmup=2000)


class Synthesizer(Experiment[Config]):
    config_class = Config

    def model(self, n_vocab: int) -> AutoregressiveTransformer:
        c = self.config
        sizes = (c.d_model, c.heads, c.d_ff, c.n_layers)
        kind = KINDS[0] if c.attention == "all" else c.attention
        rngs = nnx.Rngs(c.seed)
        return AutoregressiveTransformer(n_vocab, *sizes, kind, c.dropout, max_len=c.seq_len, rngs=rngs)


def main(arguments: Sequence[str]) -> int:
    """Train one kind, or train and compare all; returns the exit code. Raises ValueError for bad input."""
    with interruptible() as stop:
        experiment, command = parse(Synthesizer, PROGRAM, arguments)
        if experiment.config.attention != "all":
            return script.main(Synthesizer, PROGRAM, arguments, stop)
        if command.branch is not None or command.resume is not None:
            raise ValueError("attention='all': --branch and --resume take one run; name its kind with --attention")
        experiments = {kind: Synthesizer(dataclasses.replace(experiment.config, attention=kind)) for kind in KINDS}
        for kind, one in experiments.items():
            check_folder(one, command.run / kind)
        session = Session(command.options, stop, f"{PROGRAM} and the same flags again", PROGRAM)
        results: dict[str, Result] = {}
        for kind, one in experiments.items():
            session.console.print(f"\n{kind}")
            result = session.train(one, command.run / kind)
            if result is None:
                return stop.exit_code
            results[kind] = result
        session.console.print(table(results))
        return 0


def table(results: dict[str, Result]) -> Table:
    """One line per kind, and one for the baseline."""
    shown = Table(box=None)
    shown.add_column("attention")
    for heading in ("parameters", "validation loss"):
        shown.add_column(heading, justify="right")
    for kind, result in results.items():
        shown.add_row(kind, f"{result.parameters:,}", f"{result.loss:.3f}")
    baseline = next(iter(results.values())).baseline
    if baseline is not None:
        shown.add_row(baseline[0], "", f"{baseline[1]:.3f}")
    return shown


EXPERIMENT = Synthesizer

if __name__ == "__main__":
    as_program(main, PROGRAM)
