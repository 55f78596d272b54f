"""`python -m bench.generation.many`: continuous batching compared with fixed batches on a mix of lengths.

Prompts of 8 to 128 tokens are continued by 4 to 128 tokens each, both drawn log-uniformly, by a GPT-NeoX with random
weights. Fixed batches are prompts sorted by length, padded on the left, each batch decoded until its longest text ends,
as `generate` does. Both are called once to compile, then timed in turns; tokens per second count the wanted tokens
alone.
"""

import argparse
import os
import statistics


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(prog="python -m bench.generation.many", description=__doc__)
    add = arguments.add_argument
    add("--size", default="pythia_70m", metavar="NAME", help="preset of NeoXConfig (default pythia_70m)")
    add("--prompts", type=int, default=64, metavar="N", help="number of prompts (default 64)")
    add("--rows", type=int, default=8, metavar="B", help="rows decoded together (default 8)")
    add("--longest", type=int, default=128, metavar="N", help="most tokens of a prompt and of a text (default 128)")
    add("--rounds", type=int, default=3, help="timed calls of each (default 3)")
    add("--threads", type=int, default=2, help="CPU threads (default 2)")
    return arguments.parse_args()


def main() -> None:
    options = parse()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])

    import jax
    import numpy as np
    from flax import nnx

    from bench.timing import alternate, report, stamp
    from jaxmodels.generate import Sampling, generate_many
    from jaxmodels.generate.loop import Decoding
    from jaxmodels.neox import NeoX
    from jaxmodels.neox.config import PRESETS

    if options.size not in PRESETS:
        raise SystemExit(
            f"python -m bench.generation.many: unknown --size {options.size}; choose from {', '.join(PRESETS)}"
        )
    config = PRESETS[options.size]()
    model = jax.jit(lambda: NeoX(config, stacked=False, rngs=nnx.Rngs(0)))()
    random = np.random.default_rng(0)

    def mixed(smallest: int) -> list[int]:
        drawn = random.uniform(np.log(smallest), np.log(options.longest), options.prompts)
        return [round(length) for length in np.exp(drawn)]

    lengths, wanted = mixed(min(8, options.longest)), mixed(min(4, options.longest))
    prompts = [random.integers(0, config.n_vocab, length) for length in lengths]
    order = sorted(range(len(prompts)), key=lambda k: -lengths[k])

    def fixed() -> None:
        for begin in range(0, len(order), options.rows):
            batch = order[begin : begin + options.rows]
            longest = lengths[batch[0]]
            ids = np.stack([np.pad(prompts[k], (longest - lengths[k], 0)) for k in batch])
            start = np.asarray([longest - lengths[k] for k in batch])
            decoding = Decoding(model, ids, max(wanted[k] for k in batch), Sampling(), start=start)
            decoding.advance().block_until_ready()

    def continuous() -> None:
        generate_many(model, prompts, wanted, rows=options.rows)

    print(stamp(options.threads))
    seconds = alternate({"continuous": continuous, "fixed batches": fixed}, options.rounds)
    what = f"{options.prompts} prompts, {options.rows} rows, {sum(wanted)} new tokens, {options.size}"
    report(what, seconds, against="continuous")
    for name, times in seconds.items():
        print(f"{name}: {sum(wanted) / statistics.median(times):.0f} tokens/s")


if __name__ == "__main__":
    main()
