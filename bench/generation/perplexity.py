"""`python -m bench.generation.perplexity`: perplexity of a text with weights in 32, 16 and 8 bits.

Without SOURCE a small GPT-NeoX is trained first, on the bytes of Python's language reference, and tested on its last
tenth. A model of this size has no outlier features, for which LLM.int8 is made: it shows the rounding of weights alone.
With SOURCE, a checkpoint with a tokenizer is tested on the same text. Every window is read at once, so that all kinds
see the same tokens. MB are those of all weights; of an 8-bit model the embedding stays in 32 bits, and with LLM.int8
the readout too.
"""

import argparse
import math
from typing import TYPE_CHECKING, Any

from bench.device import use

if TYPE_CHECKING:  # imported by `main` once the processors are set
    import numpy as np

STEP = 1e-3  # of Adam
BATCH = 8


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(prog="python -m bench.generation.perplexity", description=__doc__)
    add = arguments.add_argument
    add("source", nargs="?", metavar="SOURCE", help="checkpoint of a NeoX with a tokenizer (default: train one)")
    add("--steps", type=int, default=300, metavar="N", help="training steps without SOURCE (default 300)")
    add("--hidden", type=int, default=128, metavar="D", help="features of the trained model (default 128)")
    add("--layers", type=int, default=4, metavar="L", help="its layers (default 4)")
    add("--length", type=int, default=128, metavar="S", help="tokens of a window (default 128)")
    add("--windows", type=int, default=200, metavar="N", help="windows to test on, at most (default 200)")
    add("--threads", type=int, default=2, help="CPU threads (default 2)")
    return arguments.parse_args()


def main() -> None:
    options = parse()
    use("cpu", options.threads)

    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxmodels
    from bench.timing import stamp
    from jaxmodels.convert.open import open_source
    from jaxmodels.neox import quantize
    from jaxmodels.text.corpora import python_docs, split

    training, held_out = split(python_docs())
    print(stamp(options.threads), flush=True)
    if options.source is None:
        data = (np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in (training, held_out))
        learned, tokens = data
        model = trained(learned, options)
        what = f"{options.layers} layers of {options.hidden} features, {options.steps} steps, bytes"
    else:
        opened = open_source(options.source)
        tokens = np.asarray(opened.vocabulary().encode(held_out), np.int32)
        model, what = jaxmodels.load(options.source, dtype="float32").unstacked(), options.source
    n = min(options.windows, (len(tokens) - 1) // options.length)
    print(f"{what}; {n} windows of {options.length} held-out tokens\n\n{'weights':<34}{'perplexity':>11}{'MB':>8}")

    def cast(dtype: str) -> Any:
        return jax.tree.map(lambda array: array.astype(dtype), model)

    half = cast("float16")
    kinds = {
        "float32": model,
        "float16, float32 arithmetic": half.narrowed() or half,
        "bfloat16": cast("bfloat16"),
        "8 bits, quantize(…, 'llm.int8')": quantize(model),
        "8 bits, quantize(…, 'weights')": quantize(model, kind="weights"),
    }
    for name, kind in kinds.items():
        size = sum(array.nbytes for array in jax.tree.leaves(kind))
        print(
            f"{name:<34}{perplexity(kind, jnp.asarray(tokens), n, options.length):>11.4f}{size / 1e6:>8.2f}", flush=True
        )


def trained(tokens: "np.ndarray", options: argparse.Namespace) -> Any:
    """A NeoX that has learned some of the bytes, by Adam with a cosine schedule."""
    import jax
    import numpy as np
    import optax
    from flax import nnx

    from jaxmodels.cross_entropy import nats
    from jaxmodels.neox import NeoX, NeoXConfig

    config = NeoXConfig(n_vocab=256, n_hidden=options.hidden, n_layers=options.layers, n_heads=4)
    model = NeoX(config, stacked=False, rngs=nnx.Rngs(0))
    tx = optax.adam(optax.cosine_decay_schedule(STEP, options.steps))
    state = tx.init(model)

    @jax.jit
    def step(model: Any, state: Any, window: jax.Array) -> tuple[Any, Any]:
        gradients = jax.grad(lambda model: nats(model(window[:, :-1]), window[:, 1:]).mean())(model)
        updates, state = tx.update(gradients, state)
        return optax.apply_updates(model, updates), state

    random = np.random.default_rng(0)
    for _ in range(options.steps):
        begins = random.integers(0, len(tokens) - options.length, BATCH)
        model, state = step(model, state, np.stack([tokens[i : i + options.length + 1] for i in begins]))
    return model


def perplexity(model: Any, tokens: Any, n: int, length: int) -> float:
    """exp of the mean loss of a token, over n windows, each read alone: LLM.int8's outliers depend on the batch."""
    import jax
    import jax.numpy as jnp

    from jaxmodels.cross_entropy import nats

    @jax.jit
    def loss(model: Any, window: Any) -> Any:
        return nats(model(window[None, :-1]).astype(jnp.float32), window[None, 1:]).mean()

    windows = [tokens[i * length : (i + 1) * length + 1] for i in range(n)]
    return math.exp(sum(float(loss(model, window)) for window in windows) / n)


if __name__ == "__main__":
    main()
