"""`python -m bench.retro`: a training step of RETRO compared with PyTorch, and speed and recall of its chunk index.

The step (forward, cross-entropy, backward, Adam) has the originals' sizes and alternates between Flax and PyTorch.
The chunk index of a real text: chunks embedded and added per second, time per query, and the share of the two nearest
chunks of exact search that IVF-PQ finds.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported by `main` once the processors are set
    import numpy as np

N_VOCAB, D_MODEL, HEADS, D_K, D_FF, N_LAYERS, CHUNK_LEN = 65, 128, 16, 16, 512, 6, 16  # the originals' experiment
QUERIES = 2000
N_PROBES = (8, 32)  # cells searched; the originals use 8


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(prog="python -m bench.retro", description=__doc__)
    arguments.add_argument("--rounds", type=int, default=5, help="timed steps of each (default 5)")
    arguments.add_argument("--threads", type=int, default=2, help="CPU threads for both frameworks (default 2)")
    arguments.add_argument("--chunks", type=int, default=32, help="chunks of a sample (default 32)")
    arguments.add_argument("--batch", type=int, default=4, help="samples of a step (default 4)")
    arguments.add_argument("--text", default="python_docs", help="text to index: python_docs, tiny_shakespeare or FILE")
    arguments.add_argument("--only", choices=["step", "index"], help="run only this part")
    return arguments.parse_args()


def main() -> None:
    options = parse()
    # XLA sizes its thread pool once, at start, by the number of processors it may use.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])

    from bench.timing import stamp

    print(stamp(options.threads))
    if options.only != "index":
        bench_step(options)
    if options.only != "step":
        bench_index(options)


def bench_step(options: argparse.Namespace) -> None:
    import numpy as np
    import torch

    from bench.timing import report, with_limit

    torch.set_num_threads(options.threads)
    rng, s = np.random.default_rng(0), options.chunks * CHUNK_LEN
    ids = rng.integers(0, N_VOCAB, (options.batch, s + 1))
    ret = rng.integers(0, N_VOCAB, (options.batch, options.chunks, 2, 2 * CHUNK_LEN))
    step, flops = flax_step(ids, ret)
    steps = {"Flax": step, "PyTorch twin, eager": torch_step(ids, ret)}
    sizes = f"S {s}, batch {options.batch}, d {D_MODEL}, H {HEADS}, 6 + 6 layers, 2 neighbors of {2 * CHUNK_LEN}"
    report(f"Training step: {sizes}, float32", with_limit(steps, options.rounds, flops), against="Flax")


def build(module: Any, **rngs: Any) -> Any:
    """RetroModel of a package, PyTorch's or Flax's."""
    encoder = module.NearestNeighborEncoder(CHUNK_LEN, N_LAYERS, {3}, D_MODEL, HEADS, D_K, D_FF, **rngs)
    return module.RetroModel(N_VOCAB, D_MODEL, N_LAYERS, {3, 5}, CHUNK_LEN, HEADS, D_K, D_FF, encoder, **rngs)


def flax_step(ids: "np.ndarray", ret: "np.ndarray") -> tuple[Callable[[], None], int]:
    """Training step of the Flax model, whose state is carried between calls, and the operations of its products."""
    import jax
    import optax
    from flax import nnx

    from jaxmodels import retro
    from jaxmodels.training.plan.flops import count

    model, tx = build(retro, rngs=nnx.Rngs(0)), optax.adam(1e-4)

    def loss(model: Any, x: jax.Array, ret: jax.Array, labels: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(x, ret), labels).mean()

    def step(model: Any, state: Any, *batch: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(model, *batch)
        updates, state = tx.update(gradients, state, model)
        return optax.apply_updates(model, updates), state, value

    compiled = jax.jit(step, donate_argnums=(0, 1))
    batch = jax.device_put((ids[:, :-1], ret, ids[:, 1:]))
    flops = 3 * count(loss, model, *batch)  # backward takes twice the forward pass
    carried = [model, tx.init(model)]

    def run() -> None:
        *carried[:], value = compiled(*carried, *batch)
        value.block_until_ready()

    return run, flops


def torch_step(ids: "np.ndarray", ret: "np.ndarray") -> Callable[[], None]:
    """Training step of the PyTorch model."""
    import torch

    import torch_ref.retro

    module = build(torch_ref.retro)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4)
    x, neighbors, labels = torch.as_tensor(ids[:, :-1]), torch.as_tensor(ret), torch.as_tensor(ids[:, 1:])

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(module(x, neighbors).flatten(0, 1), labels.flatten()).backward()
        optimizer.step()

    return run


def bench_index(options: argparse.Namespace) -> None:
    import faiss
    import numpy as np

    from jaxmodels.retro.retrieval.corpus import Corpus
    from jaxmodels.retro.retrieval.index import ChunkIndex
    from jaxmodels.text import CharVocabulary, load_corpus, split

    faiss.omp_set_num_threads(options.threads)
    text = load_corpus(options.text)
    vocabulary = CharVocabulary.of(text)
    train, held_out = map(vocabulary.encode, split(text))
    corpus = Corpus.of(train, vocabulary)
    queries = held_out[: len(held_out) // CHUNK_LEN * CHUNK_LEN].reshape(-1, CHUNK_LEN)[:QUERIES]
    print(f"\n{options.text}: index of chunks of {CHUNK_LEN} characters, {len(queries)} queries from its held-out part")
    print(f"{'':18}{'chunks':>8}{'chunks/s':>10}{'ms a query, all at once':>25}{'alone':>8}{'recall@2':>10}{'MB':>7}")
    nearest = None
    with tempfile.TemporaryDirectory() as folder:
        for factory, n_probes in {"Flat": (8,), "IVF256,PQ64": N_PROBES}.items():
            began = time.perf_counter()
            index = ChunkIndex.build(Path(folder) / factory, corpus, CHUNK_LEN, factory=factory)
            rate = len(index) / (time.perf_counter() - began)
            megabytes = next((Path(folder) / factory).glob("*.faiss")).stat().st_size / 1e6
            for index.n_probe in n_probes:
                began = time.perf_counter()
                found = index.neighbors(queries, 2)
                together = (time.perf_counter() - began) / len(queries)
                began = time.perf_counter()
                for query in queries[:100]:
                    index.neighbors(query[None], 2)
                alone = (time.perf_counter() - began) / 100
                nearest = found if nearest is None else nearest
                hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), nearest.tolist(), strict=True)]
                name = factory if factory == "Flat" else f"{factory}, {index.n_probe} cells"
                numbers = f"{1e3 * together:>25.2f}{1e3 * alone:>8.2f}{np.mean(hits) / 2:>10.3f}{megabytes:>7.1f}"
                print(f"{name:22}{len(index):>4,}{rate:>10,.0f}{numbers}")


if __name__ == "__main__":
    main()
