"""`python -m bench.generation.published`: writing from published folders, at each side's default dtype.

For each size a Hugging Face folder with random weights in 16 bits is written and loaded as users load it: by the
commands of this project and by transformers, both at their defaults; beside them this project in float32 and with
weights of 8 and 4 bits. Each writes the same number of tokens greedily after the same prompt, at batch 1. The limit of
32 bits is one product of every weight matrix with a vector for each token, that of fewer bits a share of it: the time
of reading the weights. Calls alternate in one process; ratios are medians of the rounds' ratios.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench.device import use
from bench.generation import peers
from bench.neox import products, writer

SIZES = ("pythia_70m", "pythia_160m", "pythia_410m")
OURS = {"default": None, "float32": None, "weights-8": "weights", "weights-4": "weights-4"}  # as `quantize` names them


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(prog="python -m bench.generation.published", description=__doc__)
    add = arguments.add_argument
    add("--sizes", nargs="+", default=list(SIZES), metavar="NAME", help="presets of NeoXConfig (default: 70m to 410m)")
    add("--dtypes", nargs="+", default=["float16", "bfloat16"], choices=["float16", "bfloat16"], help="of the folders")
    peers.add_timing(arguments)
    return arguments.parse_args()


def main() -> None:
    options = parse()
    use("cpu", options.threads)

    import torch

    from bench.timing import stamp
    from jaxmodels.neox.config import PRESETS

    unknown = [name for name in options.sizes if name not in PRESETS]
    if unknown:
        raise SystemExit(f"unknown --sizes {', '.join(unknown)}; choose from {', '.join(PRESETS)}")
    torch.set_grad_enabled(False)
    heading = f"{'size, stored in':<24}{'model':<27}{'tokens/s':>9}{'÷ transformers':>16}{'÷ float32':>11}"
    print(f"{stamp(options.threads)}\n\n{heading}{'÷ limit':>9}{'MB':>7}", flush=True)
    for name in options.sizes:
        for dtype in options.dtypes:
            with tempfile.TemporaryDirectory() as folder:
                print("\n".join(rows(name, dtype, Path(folder), options)), flush=True)


def rows(name: str, dtype: str, folder: Path, options: argparse.Namespace) -> list[str]:
    """Lines of the table for one folder."""
    from bench.timing import LIMIT, alternate
    from jaxmodels.neox.config import PRESETS

    write_folder(name, dtype, folder)
    calls, sizes = {}, {}
    for kind in OURS:
        calls[kind], sizes[kind] = ours(folder, kind, options)
    calls["transformers"], sizes["transformers"], its = theirs(folder, options)
    config = PRESETS[name]()
    calls[LIMIT] = products(config, config.n_layers, 1, 1, options.tokens, "float32")
    seconds = alternate(calls, options.rounds)
    bits = {"default": 16, "float32": 32, "weights-8": 8, "weights-4": 4, "transformers": 16}
    names = {
        "default": "ours, default",
        "float32": "ours, --dtype float32",
        "weights-8": "ours, --quantize weights",
        "weights-4": "ours, --quantize weights-4",
        "transformers": f"transformers, {its}",
    }
    lines: list[str] = []
    for kind, label in names.items():

        def ratio(other: str, kind: str = kind) -> str:
            pairs = zip(seconds[other], seconds[kind], strict=True)
            return f"{statistics.median(a / b for a, b in pairs):.2f}"

        rate = options.tokens / statistics.median(seconds[kind])
        what = f"{name}, {dtype}" if not lines else ""
        line = f"{what:<24}{label:<27}{rate:>9.1f}{ratio('transformers'):>16}{ratio('float32'):>11}"
        least = [second * bits[kind] / 32 for second in seconds[LIMIT]]  # the time of reading the weights
        limit = statistics.median(a / b for a, b in zip(seconds[kind], least, strict=True))
        lines.append(f"{line}{limit:>9.2f}{sizes[kind] / 1e6:>7.0f}")
    return lines


def write_folder(name: str, dtype: str, folder: Path) -> None:
    """Save a model of random weights as transformers saves it, in 16 bits."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from jaxmodels.convert.hf.config import hf_config
    from jaxmodels.neox.config import PRESETS

    config = GPTNeoXConfig.from_dict(hf_config(PRESETS[name](), dtype, {}))
    torch.manual_seed(0)
    GPTNeoXForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)


def ours(folder: Path, kind: str, options: argparse.Namespace) -> tuple[Callable[[], object], int]:
    """Decoding by this project of a folder, with the dtype of `generate`, and the bytes of the model's arrays."""
    import jax
    import numpy as np

    import jaxmodels
    from jaxmodels.neox import quantize
    from jaxmodels.weights.precision import for_inference

    model = jaxmodels.load(folder, dtype=None if kind == "default" else "float32").unstacked()
    quantized = OURS[kind]
    model = for_inference(model) if quantized is None else quantize(model, kind=quantized)
    ids = np.random.default_rng(0).integers(0, model.settings.n_vocab, (1, options.prompt))
    return writer(model, ids, options.tokens), sum(array.nbytes for array in jax.tree.leaves(model))


def theirs(folder: Path, options: argparse.Namespace) -> tuple[Callable[[], object], int, str]:
    """The same by transformers, the bytes of its parameters, and the dtype that it chose."""
    import numpy as np

    model = peers.loaded(folder)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, options.prompt))
    dtype = str(model.dtype).removeprefix("torch.")
    return peers.writer(model, ids, options.tokens), peers.nbytes(model), dtype


if __name__ == "__main__":
    main()
