"""Command `jaxmodels generate`: continue a prompt with a GPT-NeoX checkpoint.

No module imports this one; it alone in this package may import `jaxmodels.convert`.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmodels.process import programs

PROGRAM = "python -m jaxmodels.neox.generate"
EXAMPLES = """\
examples:
  jaxmodels generate pythia-70m/ --prompt "The capital of France is"
  jaxmodels generate pythia-70m/ --prompt "def f(" --temperature 0.8 --top-p 0.95 --stop $'\\n\\n'

Prints the text to standard output, and the speed (without compilation time) to standard error.
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """Arguments of the command."""
    arguments = argparse.ArgumentParser(
        prog=prog,
        description="Continue a prompt with a GPT-NeoX checkpoint. Greedy by default.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="folder written by jaxmodels.save, in transformers' format, or of GPT-NeoX shards",
    )
    arguments.add_argument("--prompt", required=True, help="text to continue")
    arguments.add_argument(
        "--max-new-tokens", type=int, default=100, metavar="N", help="maximum number of new tokens (default: 100)"
    )
    arguments.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature; 0 is greedy (default: 0)"
    )
    arguments.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely tokens")
    arguments.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the fewest tokens whose probabilities reach P"
    )
    arguments.add_argument("--seed", type=int, default=0, help="seed of sampling (default: 0)")
    arguments.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="stop before this text; repeatable (<|endoftext|> always stops)",
    )
    arguments.add_argument(
        "--config", metavar="CONFIG", help="configuration of shards without a YAML file: name of a preset, or JSON"
    )
    arguments.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="cast the weights (default: keep their dtype)"
    )
    arguments.add_argument(
        "--int8", action="store_true", help="quantize the blocks' weights to 8 bits (LLM.int8), after the cast"
    )
    arguments.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="tokenizer.json (default: tokenizer.json or 20B_tokenizer.json in CHECKPOINT or its parent folder)",
    )
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Continue a prompt and return the exit code; `prog` is the command as typed."""
    options = parser(prog).parse_args(argv)
    return programs.run(lambda: run(options), prog)


def run(options: argparse.Namespace) -> None:
    """Check the arguments, read the checkpoint and print the text; raises ValueError for a bad argument or file."""
    # Cheap checks first, so that an error is reported before a large checkpoint is read.
    import numpy as np

    from jaxmodels.generate import check
    from jaxmodels.neox.stream import Stream, StreamedText
    from jaxmodels.text import TokenizerFile, find_tokenizer

    if "" in options.stop:
        raise ValueError("--stop='' must have at least one character")
    tokenizer = TokenizerFile.read(find_tokenizer(options.tokenizer, options.checkpoint)).tokenizer
    ids = tokenizer.encode(options.prompt).ids
    if not ids:
        raise ValueError(f"--prompt={options.prompt!r} must have at least one token")
    settings = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"seed={options.seed} must be from 0 to 2³² - 1")
    check(np.asarray([ids]), options.max_new_tokens, **settings, rng=options.seed)

    model = open_checkpoint(options.checkpoint, options.dtype, options.config, options.int8)
    n_vocab, n_tokens = model.settings.n_vocab, 1 + max(tokenizer.get_vocab().values())
    if n_tokens > n_vocab:
        raise ValueError(
            f"the tokenizer has {n_tokens} tokens, the model n_vocab={n_vocab}; pass the model's own with --tokenizer"
        )
    if len(ids) + options.max_new_tokens > model.settings.max_len:
        print(
            f"generate: warning: the text may exceed the max_len={model.settings.max_len} tokens of training",
            file=sys.stderr,
        )

    tokens = Stream(model, len(ids), options.max_new_tokens, n_tokens, **settings, seed=options.seed)
    text = StreamedText(tokenizer, options.stop)
    print(options.prompt, end="", flush=True)
    began = first = time.perf_counter()
    n = 0
    for token in tokens(ids):
        first = time.perf_counter() if n == 0 else first
        n += 1
        print(text.add(token), end="", flush=True)
        if text.ended:
            break
    ended = time.perf_counter()
    print(text.rest(), flush=True)
    rate = f"{(n - 1) / (ended - first):.1f} tokens/s" if n > 1 else "one token"
    print(
        f"{len(ids)} tokens read in {first - began:.3f} s ({len(ids) / (first - began):.1f} tokens/s), "
        f"{n} written ({rate}); compiled in {tokens.compiled_in:.1f} s",
        file=sys.stderr,
    )


def open_checkpoint(folder: Path, dtype: str | None = None, config: str | None = None, int8: bool = False) -> Any:
    """Load a NeoX model from a folder in any of the three formats, with a list of layers.

    dtype: cast the weights while reading. config: name of a preset, or JSON, for shards without a YAML file. int8:
    quantize after the cast. Raises ValueError if the folder holds no GPT-NeoX model, or if dtype or int8 is given for a
    model that was saved quantized.
    """
    from flax import nnx

    import jaxmodels
    from jaxmodels.convert.operations import open_checkpoint as open_source
    from jaxmodels.convert.operations import read_neox_config
    from jaxmodels.neox import NeoX, quantize
    from jaxmodels.weights.place import load_tensors

    if holds_int8(folder):
        if dtype is not None:
            raise ValueError(f"--dtype={dtype} cannot be applied to the int8 model in {folder}")
        model = jaxmodels.load(folder).unstacked()
    else:
        source = open_source(folder, read_neox_config(config))
        abstract = nnx.eval_shape(lambda: NeoX(source.config, stacked=False, rngs=nnx.Rngs(0)))
        model = load_tensors(abstract, source.tensors, dtype, None, folder.name)
    return quantize(model) if int8 else model


def holds_int8(folder: Path) -> bool:
    """True if the folder holds a model that was saved quantized."""
    from jaxmodels.io.checkpoint import read_config

    try:
        return read_config(folder)[1].get("int8_threshold") is not None
    except ValueError:
        return False


if __name__ == "__main__":
    sys.exit(programs.run(main, PROGRAM))
