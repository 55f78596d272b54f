"""`python -m bench.neox`: prefill ("reading") and decoding ("writing") of GPT-NeoX, compared with transformers.

Alternates in one run, for each size and batch, between the Flax model; transformers' GPTNeoXForCausalLM, eager, and
for decoding also compiled with a static cache; and the limit. Prefill is one pass that fills the cache and returns
the last position's logits; its limit is one large matrix product with the same number of operations as the layers'
products. Beside it are the limit and the readout's product of one position, which it lacks, and the prefill's own
products alone, with that of the readout: no form of the rest, such as attention and activation, could be faster.
Decoding is greedy, after that prompt; its limit is one product of every weight matrix with one vector per row and
token, which reads all weights once; on a GPU, the time of copying an array with as many bytes read and written as the
weights have. Weights are random: the times do not depend on them.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bench.device import add_device, synchronize, torch_device, use

if TYPE_CHECKING:  # imported by `main` once the processors are set
    import numpy as np

    from jaxmodels.neox import NeoXConfig

Seconds = dict[str, list[float]]
READOUT, PRODUCTS = "limit and readout", "its products alone"


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(prog="python -m bench.neox", description=__doc__)
    arguments.add_argument(
        "--sizes",
        nargs="+",
        default=["pythia_70m", "pythia_160m", "pythia_410m"],
        metavar="NAME",
        help="presets of NeoXConfig (default pythia_70m pythia_160m pythia_410m)",
    )
    arguments.add_argument("--batch", type=int, nargs="+", default=[1, 16], metavar="B", help="rows (default 1 16)")
    arguments.add_argument("--prompt", type=int, default=128, metavar="S", help="tokens of the prompt (default 128)")
    arguments.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens to decode (default 64; 0: none)")
    arguments.add_argument("--rounds", type=int, default=9, help="timed calls of each (default 9)")
    add_device(arguments, threads=2)
    arguments.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="dtype of the models (default: float32; bfloat16 on a GPU)",
    )
    arguments.add_argument(
        "--quantized",
        action="store_true",
        help="also decode with weights of 8 and 4 bits (`quantize(model, kind='weights')`, `'weights-4'`) and LLM.int8",
    )
    arguments.add_argument("--no-compile", action="store_true", help="skip torch.compile, which needs a C++ compiler")
    return arguments.parse_args()


def main() -> None:
    options = parse()
    options.dtype = options.dtype or {"cpu": "float32", "gpu": "bfloat16"}[options.device]
    use(options.device, options.threads)

    import numpy as np
    import torch

    from bench.timing import alternate, report, stamp, with_limit
    from jaxmodels.neox import NeoXConfig
    from jaxmodels.neox.config import PRESETS

    unknown = [name for name in options.sizes if name not in PRESETS]
    if unknown:
        raise SystemExit(
            f"python -m bench.neox: unknown --sizes {', '.join(unknown)}; choose from {', '.join(PRESETS)}"
        )
    torch.set_grad_enabled(False)
    print(stamp(options.threads, options.device))
    for name in options.sizes:
        config: NeoXConfig = PRESETS[name]()
        for batch in options.batch:
            ids = np.random.default_rng(0).integers(0, config.n_vocab, (batch, options.prompt))
            what = f"{name}, batch {batch}, {options.dtype}"
            read, writes = flax_calls(config, ids, options)
            torch_read, torch_writes = torch_calls(config, ids, options)
            weights = sum(rows * columns for rows, columns in layer_shapes(config)) * config.n_layers
            calls = {"Flax": read, "transformers eager": torch_read}
            calls[READOUT] = products(config, 0, ids.size, batch, 1, options.dtype)
            calls[PRODUCTS] = products(config, config.n_layers, ids.size, batch, 1, options.dtype)
            seconds = with_limit(calls, options.rounds, 2 * weights * ids.size, options.dtype)
            seconds[READOUT] = [a + b for a, b in zip(seconds["limit"], seconds[READOUT], strict=True)]
            report(f"Reading {options.prompt} tokens: {what}", seconds, against="Flax")
            conclude(seconds, batch * options.prompt)
            if not options.tokens:
                continue
            limit, share = least_reading(config, batch, options)
            seconds = alternate(writes | usable(torch_writes) | {"limit": limit}, options.rounds)
            seconds["limit"] = [second * share for second in seconds["limit"]]
            report(f"Writing {options.tokens} tokens: {what}", seconds, against="Flax")
            conclude(seconds, batch * options.tokens)


def usable(peers: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Peers that run here. Prints why another one is left out: torch.compile may refuse a version of transformers."""
    kept = {}
    for name, call in peers.items():
        try:
            call()
        except Exception as error:
            print(f"{name} left out: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}")
        else:
            kept[name] = call
    return kept


def conclude(seconds: Seconds, tokens: int) -> None:
    """Print tokens per second and the medians of the rounds' ratios."""

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    rate = tokens / statistics.median(seconds["Flax"])
    peers = [name for name in seconds if name not in ("Flax", "limit", READOUT, PRODUCTS)]
    others = [f"{ratio(name, 'Flax'):.2f}× as fast as {name}" for name in peers]
    limits = f"{ratio('Flax', 'limit'):.2f}× the limit's time"
    if READOUT in seconds:
        limits += f", {ratio('Flax', READOUT):.2f}× that of the limit and the readout"
    print(f"Flax: {rate:.0f} tokens/s, {limits}, {', '.join(others)}\n")


def flax_calls(
    config: "NeoXConfig", ids: "np.ndarray", options: argparse.Namespace
) -> tuple[Callable[[], object], dict[str, Callable[[], object]]]:
    """Prefill of the prompt, and decoding after it by the loop of `jaxmodels.generate`, by the kind of weights."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxmodels.generate.loop import capacity
    from jaxmodels.neox import NeoX, quantize

    @jax.jit
    def make() -> NeoX:
        model = NeoX(config, stacked=False, rngs=nnx.Rngs(0))
        return jax.tree.map(lambda array: array.astype(options.dtype), model)

    model, (batch, length) = make(), ids.shape
    prompt = jnp.asarray(ids)
    read = jax.jit(lambda model, ids: model.prefill(ids, model.init_cache(batch, capacity(length + 1))))
    if not options.tokens:
        return lambda: jax.block_until_ready(read(model, prompt)), {}
    models = {"Flax": model}
    if options.quantized:
        models |= {"8-bit weights": quantize(model, kind="weights"), "LLM.int8": quantize(model)}
        models["4-bit weights"] = quantize(model, kind="weights-4")
    writes = {name: writer(model, ids, options.tokens) for name, model in models.items()}
    return lambda: jax.block_until_ready(read(model, prompt)), writes


def writer(model: Any, ids: "np.ndarray", tokens: int) -> Callable[[], object]:
    """Decoding of a number of tokens after a prompt that was read already."""
    import copy

    import jax
    import jax.numpy as jnp

    from jaxmodels.generate import Sampling
    from jaxmodels.generate.loop import Decoding

    # The first token comes from the prompt's logits, so N decoding steps write N + 1 tokens.
    decoding = Decoding(model, ids, tokens + 1, Sampling())
    decoding.advance(1)

    def write() -> None:
        again = copy.copy(decoding)
        again.state = jax.tree.map(jnp.copy, decoding.state)  # a few MB; the loop takes its state over
        again.advance().block_until_ready()

    return write


def torch_calls(
    config: "NeoXConfig", ids: "np.ndarray", options: argparse.Namespace
) -> tuple[Callable[[], object], dict[str, Callable[[], object]]]:
    """The same with transformers and its default attention: the prefill, and the decoding calls by name."""
    import copy

    import torch
    from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM, StaticCache

    from jaxmodels.convert.hf.config import hf_config
    from jaxmodels.generate.loop import capacity

    theirs = GPTNeoXConfig.from_dict(hf_config(config, options.dtype, {}))
    device = torch_device(options.device)
    with torch.device(device):
        model = GPTNeoXForCausalLM(theirs).eval().to(getattr(torch, options.dtype))
    prompt = torch.as_tensor(ids, device=device)

    def fill(cache: Any) -> torch.Tensor:
        return model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(dim=-1)

    def read() -> None:
        fill(DynamicCache(config=theirs))
        synchronize(options.device)

    dynamic = DynamicCache(config=theirs)
    first = fill(dynamic)

    def write_with(step: Any, cache: Any) -> None:
        token = first
        for _ in range(options.tokens):
            token = step(token, past_key_values=cache, use_cache=True).logits.argmax(dim=-1).clone()
        synchronize(options.device)

    writes: dict[str, Callable[[], object]] = {
        "transformers eager": lambda: write_with(model, copy.deepcopy(dynamic))  # a copy of a few MB
    }
    if not options.no_compile:
        length = ids.shape[1]
        static: Any = StaticCache(config=theirs, max_cache_len=max(capacity(length + 1), length + options.tokens))
        fill(static)
        compiled = torch.compile(model, mode="reduce-overhead" if device == "cuda" else None, fullgraph=True)

        def write() -> None:
            for layer in static.layers:
                layer.cumulative_length.fill_(length)
            write_with(compiled, static)

        writes["transformers compiled"] = write
    return read, writes


def least_reading(config: "NeoXConfig", batch: int, options: argparse.Namespace) -> tuple[Callable[[], object], float]:
    """A call that takes the least time of decoding, or a part of it, and how often decoding takes that time."""
    import jax
    import jax.numpy as jnp

    if options.device == "cpu":
        return products(config, config.n_layers, batch, batch, options.tokens, options.dtype), 1.0
    a = jnp.zeros((1 << 28,), jnp.float32)  # 1 GB: far more than the caches hold
    copy = jax.jit(lambda a: a + 1)
    weights = sum(rows * columns for rows, columns in layer_shapes(config)) * config.n_layers
    weights += config.n_hidden * config.n_vocab
    read = weights * jnp.dtype(options.dtype).itemsize * options.tokens
    return lambda: copy(a).block_until_ready(), read / (2 * a.nbytes)


def layer_shapes(config: "NeoXConfig") -> list[tuple[int, int]]:
    d, d_ff = config.n_hidden, config.d_ff
    return [(d, 3 * d), (d, d), (d, d_ff), (d_ff, d)]


def products(config: "NeoXConfig", layers: int, rows: int, read: int, times: int, dtype: str) -> Callable[[], object]:
    """Products of the weight matrices of a number of layers and of the readout with vectors, several times in sequence.

    rows: vectors for the layers' matrices; read: those for the readout.
    """
    import jax
    import jax.numpy as jnp

    shapes = layer_shapes(config) * layers + [(config.n_hidden, config.n_vocab)]
    weights = [jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes)]
    x = jnp.ones((rows, max(config.d_ff, config.n_hidden)), dtype)

    @jax.jit
    def run(weights: list[jax.Array], x: jax.Array) -> jax.Array:
        def step(_: jax.Array, x: jax.Array) -> jax.Array:
            # The largest entry of each product enters the next one's vectors, so that XLA can neither remove a product
            # nor hoist it out of the loop.
            largest = [(x[:, : len(w)] @ w).max(axis=1, keepdims=True) for w in weights[:-1]]
            last = (x[:read, : config.n_hidden] @ weights[-1]).max()
            return x + 1e-9 * (sum(largest) + last)

        return jax.lax.fori_loop(0, times, step, x)

    return lambda: run(weights, x).block_until_ready()


if __name__ == "__main__":
    main()
