"""`python -m bench.score`: loss of many documents with Pythia-70M's shape, compared with transformers.

Both score the same documents of random tokens with the same random weights in float32, and the losses are compared.
Lengths are uniform between half and one and a half times --length. transformers: batches in the order given, padded to
the longest document of each, eager calls, whole logits, cross-entropy; with --sorted also with the documents sorted by
length first. jaxmodels: `jaxmodels.scoring.score`, the first call, with compilation; with --again also a second. The
limit is the time of the documents' products, without padding and attention, at the speed of one large product.
"""

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported by `main` once the processors are set
    import numpy as np


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(prog="python -m bench.score", description=__doc__)
    add = arguments.add_argument
    add("--size", default="pythia_70m", metavar="NAME", help="preset of NeoXConfig (default pythia_70m)")
    add("--documents", type=int, default=1000, metavar="N", help="number of documents (default 1000)")
    add("--length", type=int, default=200, metavar="S", help="mean number of tokens (default 200)")
    add("--batch-size", type=int, nargs="+", default=[8, 32], metavar="B", help="transformers' rows (default 8 32)")
    add("--sorted", action="store_true", help="also transformers with the documents sorted by length")
    add("--again", action="store_true", help="also a second call of jaxmodels, without compilation")
    add("--threads", type=int, default=2, help="CPU threads for both frameworks (default 2)")
    return arguments.parse_args()


def main() -> None:
    options = parse()
    os.environ["JAX_PLATFORMS"] = "cpu"
    # XLA sizes its thread pool once, at start, by the number of processors it may use.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])

    import numpy as np
    import torch

    from bench.timing import stamp
    from jaxmodels.neox.config import PRESETS
    from jaxmodels.scoring import score

    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    print(stamp(options.threads), flush=True)
    theirs, ours = models(PRESETS[options.size]())
    rng = np.random.default_rng(0)
    lengths = rng.integers(options.length // 2, options.length * 3 // 2, options.documents, endpoint=True)
    documents = [rng.integers(0, theirs.config.vocab_size, n) for n in lengths]
    print(f"{options.documents} documents of {lengths.min()} to {lengths.max()} tokens, {lengths.sum():,} in all")

    def flax_losses() -> list[float]:
        return [float(found.loss or 0) for found in score(ours, documents).documents]

    ours_seconds, losses = timed("jaxmodels, with compilation", flax_losses)
    if options.again:
        ours_seconds, losses = timed("jaxmodels, second call", flax_losses)
    limit = least(PRESETS[options.size](), int(lengths.sum()))
    print(f"{limit:8.1f} s  limit; jaxmodels takes {ours_seconds[0] / limit:.2f}× its time", flush=True)
    orders = {"in order": list(range(len(documents)))}
    if options.sorted:
        orders["sorted by length"] = sorted(orders["in order"], key=lambda i: -len(documents[i]))
    for batch_size in options.batch_size:
        for name, order in orders.items():
            what = f"transformers, batches of {batch_size} {name}"
            seconds, reference = timed(what, functools.partial(torch_losses, theirs, documents, order, batch_size))
            worst = max(abs(a - b) / b for a, b in zip(losses, reference, strict=True))
            ratios = [slower / faster for slower, faster in zip(seconds, ours_seconds, strict=True)]
            print(
                f"    jaxmodels is {ratios[0]:.2f}× as fast, in {1 / ratios[1]:.0%} of the processor time; largest "
                f"relative difference of a document's loss {worst:.1e}",
                flush=True,
            )


def timed(what: str, function: Callable[[], list[float]]) -> tuple[tuple[float, float], list[float]]:
    """Seconds, and processor seconds of all threads, which depend less on other processes; and the result."""
    began, used = time.perf_counter(), time.process_time()
    found = function()
    seconds = time.perf_counter() - began, time.process_time() - used
    print(f"{seconds[0]:8.1f} s ({seconds[1]:.1f} s of processor time)  {what}", flush=True)
    return seconds, found


def least(config: Any, tokens: int) -> float:
    """Seconds of the weights' products with a number of tokens, were they one large product: median of five."""
    from bench.neox import layer_shapes
    from bench.timing import alternate, large_product

    weights = sum(rows * columns for rows, columns in layer_shapes(config)) * config.n_layers
    product, share = large_product(2 * tokens * (weights + config.n_hidden * config.n_vocab), "float32")
    return share * statistics.median(alternate({"product": product}, 5)["product"])


def models(config: Any) -> tuple[Any, Any]:
    """The same model in transformers and here, with transformers' random weights."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from jaxmodels.convert.hf import load_hf
    from jaxmodels.convert.hf.config import hf_config

    theirs = GPTNeoXForCausalLM(GPTNeoXConfig.from_dict(hf_config(config, "float32", {}))).eval()
    for parameter in theirs.parameters():  # larger than initial weights, so that the losses differ as a trained model's
        if parameter.ndim > 1:
            parameter.mul_(3)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, load_hf(Path(folder))


def torch_losses(model: Any, documents: "Sequence[np.ndarray]", order: list[int], batch_size: int) -> list[float]:
    """Nats per token of each document, in batches padded on the right."""
    import torch

    found = [0.0] * len(documents)
    for at in range(0, len(order), batch_size):
        chosen = order[at : at + batch_size]
        longest = max(len(documents[i]) for i in chosen)
        ids = torch.zeros((len(chosen), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            ids[row, : len(documents[i])] = torch.as_tensor(documents[i])
            mask[row, : len(documents[i])] = 1
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # [B, S, V]
        targets = torch.full_like(ids, -100)
        targets[:, :-1] = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        totals = losses.view(ids.shape).double().sum(dim=1) / (mask.sum(dim=1) - 1)
        for i, loss in zip(chosen, totals.tolist(), strict=True):
            found[i] = loss
    return found


if __name__ == "__main__":
    main()
