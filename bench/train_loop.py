"""`python -m bench.train_loop`: overhead of the training loop over its steps, at steps of about 50 ms.

Alternates in one process: the compiled step alone, repeated on one batch; and the loop that scripts run it in, with
data, metrics, TensorBoard, the progress line, and a checkpoint per round, which is written while the next round
computes. Both take the same number of the same steps. The limit is 3 %.
"""

import argparse
import os
import tempfile
from pathlib import Path

LIMIT = 0.03


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(prog="python -m bench.train_loop", description=__doc__)
    arguments.add_argument("--rounds", type=int, default=9, help="timed rounds of each (default 9)")
    arguments.add_argument("--steps", type=int, default=100, help="steps of a round (default 100)")
    arguments.add_argument("--batch", type=int, default=8, help="sequences of a step (default 8)")
    arguments.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    return arguments.parse_args()


def main() -> None:
    options = parse()
    # XLA sizes its thread pool once, at start, by the number of processors it may use.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])

    import statistics

    import jax
    from rich.console import Console

    from bench.timing import alternate, report, stamp
    from jaxmodels.training import metrics
    from jaxmodels.training.config import Options
    from jaxmodels.training.loop import Loop, StepMetrics
    from jaxmodels.training.reporting.progress import Line
    from jaxmodels.training.reporting.trackers import TensorBoard, Trackers
    from jaxmodels.training.signals import Stop
    from jaxmodels.training.trainer import Trainer
    from train import rope

    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "shown", "w", encoding="utf-8") as shown:
        config = rope.Config(batch_size=options.batch, n_layers=2, keep=1)
        experiment = rope.Rope(config)
        run = Trainer(experiment, Path(folder) / "run", Options())
        log = metrics.Log(run.folder, [])
        trackers = Trackers([log, TensorBoard(run.folder, 0)], run.folder)
        line = Line(Console(file=shown), 10**6, 0, config.batch_size * config.seq_len, 0.0, None)

        class Callbacks:
            def on_step(self, metrics: StepMetrics) -> None:
                line.advance(metrics.loss, metrics.seconds)
                values = {"loss": metrics.loss, "grad_norm": metrics.grad_norm, "seconds": metrics.seconds}
                trackers.step(metrics.step, values)

            def on_compile(self, length: int, seconds: float) -> None:
                pass

        loop = Loop(run.program, run.position, run.batches, Stop(), Callbacks())
        loop.compile(experiment.abstract_batch())
        assert loop.compiled is not None
        step, batch, flags = loop.compiled, next(run.batches), loop.flags[False]
        own = [run.program.make_state(1)]

        def alone() -> None:
            for _ in range(options.steps):
                own[0], last = step(own[0], batch, flags)
            jax.block_until_ready(last)

        def in_the_loop() -> None:
            loop.advance(run.position.step + options.steps)
            run.checkpoints.save(run.position)

        print(stamp(options.threads))
        with line:
            seconds = alternate({"steps alone": alone, "in the loop": in_the_loop}, options.rounds)
        run.close()
        trackers.close()
    report(f"{options.steps} steps, batch {options.batch}, float32", seconds, against="steps alone")
    step = statistics.median(seconds["steps alone"]) / options.steps
    pairs = zip(seconds["in the loop"], seconds["steps alone"], strict=True)
    added = statistics.median(loop / alone - 1 for loop, alone in pairs)
    print(
        f"a step takes {1e3 * step:.1f} ms; the loop adds {added:.1%}, {1e3 * step * added:.2f} ms (limit {LIMIT:.0%})"
    )


if __name__ == "__main__":
    main()
