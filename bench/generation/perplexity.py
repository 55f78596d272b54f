"""`python -m bench.generation.perplexity`: perplexity, size and speed of weights in 32, 16, 8 and 4 bits.

Without SOURCE a GPT-NeoX is trained first, on the bytes of Python's language reference, and tested on its last tenth.
A model of this size has no outlier features, for which LLM.int8 is made: it shows the rounding of weights alone. With
SOURCE, a checkpoint with a tokenizer such as Pythia is tested on the same text.

Peers read the same model from a Hugging Face folder: transformers, and if they are installed, torchao and bitsandbytes.
Every window is read at once, so that all kinds see the same tokens. MB are those of all weights; which of them are
quantized depends on the kind: LLM.int8 and NF4 leave embedding and readout as they are, the others the embedding.
Tokens/s are those of greedy decoding at batch 1, timed in turns in one process; ratios are medians of the rounds'. The
limit is one product of every weight matrix in float32 with a vector for each token, of which a kind with fewer bytes
has that share: the time of reading its weights.
"""

import argparse
import functools
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.device import use
from bench.generation import peers
from bench.neox import products, writer

if TYPE_CHECKING:  # imported by `main` once the processors are set
    import numpy as np

STEP = 1e-3  # of Adam
BATCH = 8
AGAINST = "transformers, float32"


class Kind(NamedTuple):
    """A model: mean loss of a window, decoding, and bytes of its weights."""

    loss: Callable[["np.ndarray"], float]
    write: Callable[[], object]
    nbytes: int


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(prog="python -m bench.generation.perplexity", description=__doc__)
    add = arguments.add_argument
    add("source", nargs="?", metavar="SOURCE", help="checkpoint of a NeoX with a tokenizer (default: train one)")
    add("--steps", type=int, default=300, metavar="N", help="training steps without SOURCE (default 300)")
    add("--hidden", type=int, default=256, metavar="D", help="features of the trained model (default 256)")
    add("--layers", type=int, default=6, metavar="L", help="its layers (default 6)")
    add("--length", type=int, default=128, metavar="S", help="tokens of a window (default 128)")
    add("--windows", type=int, default=60, metavar="N", help="windows to test on, at most (default 60)")
    peers.add_timing(arguments)
    return arguments.parse_args()


def main() -> None:
    options = parse()
    use("cpu", options.threads)

    import numpy as np

    import jaxmodels
    from bench.timing import LIMIT, alternate, stamp
    from jaxmodels.convert.hf import save_hf
    from jaxmodels.convert.open import open_source
    from jaxmodels.text.corpora import python_docs, split

    training, held_out = split(python_docs())
    print(stamp(options.threads), flush=True)
    if options.source is None:
        learned, tokens = (np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in (training, held_out))
        model = trained(learned, options)
        what = f"trained here: {options.layers} layers of {options.hidden} features, {options.steps} steps, bytes"
    else:
        tokens = np.asarray(open_source(options.source).vocabulary().encode(held_out), np.int32)
        model, what = jaxmodels.load(options.source, dtype="float32").unstacked(), options.source
    n = min(options.windows, (len(tokens) - 1) // options.length)
    windows = [tokens[i * options.length : (i + 1) * options.length + 1] for i in range(n)]
    print(f"{what}; {n} windows of {options.length} held-out tokens; writing {options.tokens} tokens\n", flush=True)

    prompt = tokens[None, : options.prompt]
    kinds: dict[str, Kind | str] = ours(model, prompt, options.tokens)
    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, Path(folder) / "hf")
        kinds |= theirs(Path(folder) / "hf", prompt, options.tokens)
    usable = {name: kind for name, kind in kinds.items() if isinstance(kind, Kind)}
    limit = {LIMIT: products(model.settings, model.settings.n_layers, 1, 1, options.tokens, "float32")}
    seconds = alternate({name: kind.write for name, kind in usable.items()} | limit, options.rounds)
    whole = usable["float32"].nbytes
    print(f"{'weights':<36}{'perplexity':>11}{'MB':>8}{'tokens/s':>10}{f'÷ {AGAINST}':>25}{'÷ limit':>9}")
    for name, kind in kinds.items():
        if isinstance(kind, str):
            print(f"{name:<36} not run: {kind}")
            continue
        perplexity = math.exp(statistics.fmean(kind.loss(window) for window in windows))
        rate = options.tokens / statistics.median(seconds[name])
        ratio = statistics.median(a / b for a, b in zip(seconds[AGAINST], seconds[name], strict=True))
        least = [second * kind.nbytes / whole for second in seconds[LIMIT]]
        times = statistics.median(a / b for a, b in zip(seconds[name], least, strict=True))
        row = f"{name:<36}{perplexity:>11.4f}{kind.nbytes / 1e6:>8.2f}{rate:>10.1f}{ratio:>25.2f}{times:>9.2f}"
        print(row, flush=True)


def ours(model: Any, prompt: "np.ndarray", tokens: int) -> dict[str, Kind | str]:
    """A NeoX in float32, and what this project makes of it."""
    import jax
    import jax.numpy as jnp

    from jaxmodels.cross_entropy import nats
    from jaxmodels.neox import quantize

    @jax.jit
    def loss(model: Any, window: Any) -> Any:
        return nats(model(window[None, :-1]).astype(jnp.float32), window[None, 1:]).mean()

    def kind(model: Any) -> Kind:
        size = sum(array.nbytes for array in jax.tree.leaves(model))
        return Kind(lambda window: float(loss(model, window)), writer(model, prompt, tokens), size)

    def cast(dtype: str) -> Any:
        return jax.tree.map(lambda array: array.astype(dtype), model)

    half = cast("float16")
    models = {
        "float32": model,
        "float16, float32 arithmetic": half.narrowed() or half,
        "bfloat16": cast("bfloat16"),
        "8 bits, quantize(…, 'llm.int8')": quantize(model),
        "8 bits, quantize(…, 'weights')": quantize(model, kind="weights"),
        "4 bits, quantize(…, 'weights-4')": quantize(model, kind="weights-4"),
    }
    return {name: kind(model) for name, model in models.items()}


def theirs(folder: Path, prompt: "np.ndarray", tokens: int) -> dict[str, Kind | str]:
    """The same model of a Hugging Face folder in other packages, or why one cannot be used."""
    found: dict[str, Kind | str] = {}
    for name, model in peers.peers(folder):
        if isinstance(model, str):
            found[name] = model
            continue
        write = peers.writer(model, prompt.astype("int64"), tokens)
        found[name] = Kind(functools.partial(peers.loss, model), write, peers.nbytes(model))
    return found


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


if __name__ == "__main__":
    main()
