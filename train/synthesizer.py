"""Every kind of Synthesizer on one text, side by side, with attention as they replace it, and a character 4-gram model.

    python -m train.synthesizer --text tiny_shakespeare    # or a FILE; without --text: Python's own language reference
    python -m train.synthesizer --attention random+dense   # one of them alone

Hardware   2 CPU cores, which test runs were using too; float32
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
           fixed_random stays above the 4-gram, between a 2-gram (2.486) and a 3-gram (2.049): what it mixes is drawn
           once and never learnt, so no head can come to look at the characters just before. The others clear it.

Each kind is a run of its own, RUNS/KIND. The same command goes on where it was stopped, and says again what is done.
"""

import dataclasses
from collections.abc import Sequence

from flax import nnx
from rich.table import Table

from jaxmodels.training import experiment
from jaxmodels.training.config import check_folder, parse
from jaxmodels.training.experiment import Result, as_program, carry_out, start
from jaxmodels.training.signals import interruptible
from jaxmodels.transformer import AutoregressiveTransformer

PROGRAM = "python -m train.synthesizer"
# The last, dot products alone, is what the others stand in for; none of them knows positions but by its table.
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
class Config(experiment.Config):
    """What decides the numbers of a run."""

    warmup: int = 300
    """steps until the schedule's peak"""
    attention: str = "all"
    """a kind of SynthesizerAttention, or a sum such as random+dense; all: several, one after the other"""

    @classmethod
    def small(cls) -> "Config":
        """For two CPU cores."""
        return cls()

    @classmethod
    def original(cls) -> "Config":
        """The sizes of the original character experiments: meant for an accelerator."""
        return cls(heads=16, n_layers=6, seq_len=512, batch_size=4, steps=30_000, warmup=2000)

    def model(self, n_vocab: int) -> AutoregressiveTransformer:
        sizes = (self.d_model, self.heads, self.d_ff, self.n_layers)
        kind = KINDS[0] if self.attention == "all" else self.attention
        rngs = nnx.Rngs(self.seed)
        return AutoregressiveTransformer(n_vocab, *sizes, kind, self.dropout, max_len=self.seq_len, rngs=rngs)


def main(arguments: Sequence[str]) -> int:
    """Trains one kind, or all and compares them; the exit code. Raises ValueError for bad input."""
    with interruptible() as stop:
        command = parse(Config, PROGRAM, arguments)
        if command.config.attention != "all":
            return experiment.main(Config, PROGRAM, arguments, stop)
        runs = {kind: (dataclasses.replace(command.config, attention=kind), command.run / kind) for kind in KINDS}
        for settings, folder in runs.values():
            check_folder(settings, folder)
        console = start(command.options)
        results: dict[str, Result] = {}
        for kind, (settings, folder) in runs.items():
            console.print(f"\n{kind}")
            go_on = f"{PROGRAM} and the same flags again"
            result = carry_out(settings, folder, command.options, stop, console, go_on)
            if result is None:
                return stop.exit_code
            results[kind] = result
        console.print(table(results))
        return 0


def table(results: dict[str, Result]) -> Table:
    """A line per kind, and one for the baseline."""
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


if __name__ == "__main__":
    as_program(main, PROGRAM)
