"""`python -m bench.generation.many`: continuous batching compared with fixed batches on a mix of lengths.

Prompts of 8 to 128 tokens are continued by 4 to 128 tokens each, both drawn log-uniformly, by a GPT-NeoX with random
weights; in 16 bits as `generate` keeps those of a published folder. Fixed batches are prompts sorted by length, padded
on the left, each batch decoded until its longest text ends, as `generate` does. Both are called once to compile, then
timed in turns; tokens per second count the wanted tokens alone. The ratio of decoding steps would be that of the times
if reading prompts took none. The limit is that of continuous batching: the time of reading all weights once for each
of its decoding steps, and the products of the prompts at the speed of one large product.
"""

import argparse
import heapq
import os
import statistics
from collections.abc import Callable

READ = "reading weights"
READINGS = 16  # in sequence, so that their start is a small part of the time


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(prog="python -m bench.generation.many", description=__doc__)
    add = arguments.add_argument
    add("--size", default="pythia_70m", metavar="NAME", help="preset of NeoXConfig (default pythia_70m)")
    add("--prompts", type=int, default=64, metavar="N", help="number of prompts (default 64)")
    add("--rows", type=int, default=8, metavar="B", help="rows decoded together (default 8)")
    add("--longest", type=int, default=128, metavar="N", help="most tokens of a prompt and of a text (default 128)")
    add("--longest-text", type=int, metavar="N", help="most tokens of a text (default --longest)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the weights (float32)")
    add("--rounds", type=int, default=3, help="timed calls of each (default 3)")
    add("--threads", type=int, default=2, help="CPU threads (default 2)")
    return arguments.parse_args()


def main() -> None:
    options = parse()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])

    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from bench.neox import layer_shapes, products
    from bench.timing import LIMIT, report, stamp, with_limit
    from jaxmodels.generate import Sampling, generate_many
    from jaxmodels.generate.loop import Decoding
    from jaxmodels.models import cast
    from jaxmodels.neox import NeoX
    from jaxmodels.neox.config import PRESETS
    from jaxmodels.weights.names import flat_arrays
    from jaxmodels.weights.precision import for_inference

    if options.size not in PRESETS:
        raise SystemExit(
            f"python -m bench.generation.many: unknown --size {options.size}; choose from {', '.join(PRESETS)}"
        )
    config = PRESETS[options.size]()
    model = jax.jit(lambda: NeoX(config, stacked=False, rngs=nnx.Rngs(0)))()
    if options.dtype != "float32":
        model = for_inference(cast(model, flat_arrays(model), options.dtype))
    random = np.random.default_rng(0)

    def mixed(smallest: int, longest: int) -> list[int]:
        drawn = random.uniform(np.log(min(smallest, longest)), np.log(longest), options.prompts)
        return [round(length) for length in np.exp(drawn)]

    lengths, wanted = mixed(8, options.longest), mixed(4, options.longest_text or options.longest)
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
    batches = [order[begin : begin + options.rows] for begin in range(0, len(order), options.rows)]
    ours, theirs = steps(wanted, options.rows), sum(max(wanted[k] for k in batch) - 1 for batch in batches)
    weights = sum(rows * columns for rows, columns in layer_shapes(config)) * config.n_layers
    read = 2 * (weights * sum(lengths) + config.n_hidden * config.n_vocab * options.prompts)
    calls: dict[str, Callable[[], object]] = {"continuous": continuous, "fixed batches": fixed}
    calls[READ] = products(config, config.n_layers, 1, 1, READINGS, "float32")
    seconds = with_limit(calls, options.rounds, read)
    share = ours / READINGS * jnp.dtype(options.dtype).itemsize / 4
    pairs = zip(seconds[LIMIT], seconds.pop(READ), strict=True)
    seconds[LIMIT] = [product + share * reading for product, reading in pairs]
    what = (
        f"{options.prompts} prompts, {options.rows} rows, {sum(wanted)} new tokens, {options.size} in {options.dtype}"
    )
    report(what, seconds, against="continuous")
    for name in ("continuous", "fixed batches"):
        print(f"{name}: {sum(wanted) / statistics.median(seconds[name]):.0f} tokens/s")
    print(f"decoding steps: {ours} and {theirs}, {theirs / ours:.2f} times as many")


def steps(wanted: list[int], rows: int) -> int:
    """Decoding steps of continuous batching, the longest texts first; the first token comes with the prompt."""
    ends = [0] * rows
    for tokens in sorted(wanted, reverse=True):
        heapq.heappush(ends, heapq.heappop(ends) + tokens - 1)
    return max(ends)


if __name__ == "__main__":
    main()
