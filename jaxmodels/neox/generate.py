"""`python -m jaxmodels.neox.generate`: a checkpoint continues a prompt; the text is printed as it comes."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxmodels import programs
from jaxmodels.extras import require

PROGRAM = "python -m jaxmodels.neox.generate"
TOKENIZERS = ("tokenizer.json", "20B_tokenizer.json")
END_OF_TEXT = "<|endoftext|>"
EXAMPLES = """\
examples:
  python -m jaxmodels.neox.generate pythia-70m/ --prompt "The capital of France is"
  python -m jaxmodels.neox.generate pythia-70m/ --prompt "def f(" --temperature 0.8 --top-p 0.95 --stop $'\\n\\n'

The text goes to the standard output, the speed to the standard error. Compilation is not counted.
"""


class Tokenizer(Protocol):
    """What is used of `tokenizers.Tokenizer`."""

    def encode(self, sequence: str) -> Any: ...
    def token_to_id(self, token: str) -> int | None: ...
    def get_vocab(self) -> dict[str, int]: ...


def parser(prog: str) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog=prog,
        description="Continues a prompt with a GPT-NeoX checkpoint. Greedy unless a temperature is given.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a folder: jaxmodels.save's, transformers', or shards"
    )
    arguments.add_argument("--prompt", required=True, help="the text to continue")
    arguments.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="at most so many (default 100)")
    arguments.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default); 1 draws as predicted")
    arguments.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    arguments.add_argument("--top-p", type=float, metavar="P", help="draw from the fewest that together reach P")
    arguments.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    arguments.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help=f"end before this text; repeatable ({END_OF_TEXT} ends always)",
    )
    arguments.add_argument("--config", metavar="CONFIG", help="of shards without a YAML file: a preset's name, or JSON")
    arguments.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="cast the weights (default: keep)"
    )
    arguments.add_argument(
        "--int8", action="store_true", help="quantise the blocks' weights to 8 bits (LLM.int8), after the cast"
    )
    arguments.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help=f"default: {' or '.join(TOKENIZERS)} in CHECKPOINT or beside it"
    )
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Continue a prompt and return the exit code; `prog` is the command as typed."""
    options = parser(prog).parse_args(argv)
    return programs.run(lambda: run(options), prog)


def run(options: argparse.Namespace) -> None:
    """Reads the smaller things first: what is wrong with them is said before a large checkpoint is read."""
    import numpy as np

    from jaxmodels.generate import check

    if "" in options.stop:
        raise ValueError("--stop must be a text of at least one character")
    tokenizer = open_tokenizer(options.tokenizer, options.checkpoint)
    ids = tokenizer.encode(options.prompt).ids
    if not ids:
        raise ValueError("--prompt must have at least one token")
    settings = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"seed={options.seed} must be 0 or more, and less than 2³²")
    check(np.asarray([ids]), options.max_new_tokens, **settings, rng=options.seed)

    model = open_checkpoint(options.checkpoint, options.dtype, options.config, options.int8)
    n_vocab, n_tokens = model.settings.n_vocab, 1 + max(tokenizer.get_vocab().values())
    if n_tokens > n_vocab:
        raise ValueError(f"the tokenizer has {n_tokens} tokens, the model only {n_vocab}: they do not belong together")
    if len(ids) + options.max_new_tokens > model.settings.max_len:
        print(
            f"generate: beyond the {model.settings.max_len} positions that the model was trained for", file=sys.stderr
        )

    tokens = Stream(model, len(ids), options.max_new_tokens, n_tokens, **settings, seed=options.seed)
    text = Text(tokenizer, options.stop)
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
    """The NeoX model in a folder of any of the three formats, its layers listed, straight in the dtype asked for.

    config: a preset's name or JSON, for shards that do not say what they are. Raises ValueError where there is none.
    A model that was quantised before it was saved stays as it is: to cast or to quantise it is a ValueError.
    """
    from flax import nnx

    import jaxmodels
    from jaxmodels.convert.operations import configured, opened
    from jaxmodels.neox import NeoX, quantize
    from jaxmodels.weights.place import placed

    if holds_int8(folder):
        if dtype is not None:
            raise ValueError(f"{folder} holds an int8 model, whose weights cannot be cast to {dtype}")
        model = jaxmodels.load(folder).unstacked()
    else:
        source = opened(folder, configured(config))
        abstract = nnx.eval_shape(lambda: NeoX(source.config, stacked=False, rngs=nnx.Rngs(0)))
        model = placed(abstract, source.tensors, dtype, None, folder.name)
    return quantize(model) if int8 else model


def holds_int8(folder: Path) -> bool:
    """Is this the folder of a model that was quantised before it was saved?"""
    from jaxmodels.io.checkpoint import read_config

    try:
        return read_config(folder)[1].get("int8_threshold") is not None
    except ValueError:
        return False


def open_tokenizer(file: Path | None, folder: Path) -> Tokenizer:
    """The tokenizer in a file, or the one in or beside a checkpoint's folder; raises ValueError where there is none."""
    require("neox", "tokenizers")
    from tokenizers import Tokenizer

    found = find_tokenizer(file, folder)
    try:
        return Tokenizer.from_file(str(found))
    except Exception as error:  # tokenizers raises nothing more precise
        raise ValueError(f"{found} is no tokenizer file: {error}") from None


def find_tokenizer(file: Path | None, folder: Path) -> Path:
    """The file given, or the tokenizer's in or beside a checkpoint's folder; raises ValueError where there is none."""
    places = [place / name for place in (folder, folder.absolute().parent) for name in TOKENIZERS]
    candidates = places if file is None else [file]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise ValueError(f"no tokenizer: there is no {', '.join(map(str, candidates))}")
    return found


class Stream:
    """Tokens one by one: the same that `jaxmodels.generate.generate` returns at once, compiled ahead of time.

    Rows of the vocabulary beyond the tokenizer's n_tokens are padding and never drawn.
    """

    def __init__(
        self,
        model: Any,
        length: int,
        max_new_tokens: int,
        n_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ):
        import jax
        import jax.numpy as jnp

        from jaxmodels.generate import sample

        self.max_new_tokens = max_new_tokens
        sampler = (temperature, top_p) if temperature else None
        # As a flat list of arrays: a module would be taken apart anew for every token.
        self.weights, structure = jax.tree.flatten(model)
        self.cache = model.init_cache(1, length + max_new_tokens)

        def draw(logits, i):
            logits = jnp.where(jnp.arange(logits.shape[-1]) < n_tokens, logits, -jnp.inf)
            return sample(logits, sampler, top_k, jax.random.fold_in(jax.random.key(seed), i))

        def prefill(weights, ids, cache):
            logits, cache = jax.tree.unflatten(structure, weights).prefill(ids, cache)
            return draw(logits, 0), jnp.ones((), jnp.int32), cache.packed()

        def decode(weights, token, i, cache):
            logits, cache = jax.tree.unflatten(structure, weights).decode(token[:, None], cache.unpacked())
            return draw(logits[:, 0], i), i + 1, cache.packed()

        began = time.perf_counter()
        arguments = self.weights, jax.ShapeDtypeStruct((1, length), jnp.int32), self.cache
        self.prefill = jax.jit(prefill, donate_argnums=2).lower(*arguments).compile()
        arguments = self.weights, *jax.eval_shape(prefill, *arguments)
        self.decode = jax.jit(decode, donate_argnums=3).lower(*arguments).compile()
        self.compiled_in = time.perf_counter() - began

    def __call__(self, ids: Sequence[int]) -> Iterator[int]:
        """The tokens after a prompt of the length that was announced; once, as the cache is used up."""
        import jax.numpy as jnp

        token, i, cache = self.prefill(self.weights, jnp.asarray([ids], jnp.int32), self.cache)
        for _ in range(self.max_new_tokens - 1):
            following, i, cache = self.decode(self.weights, token, i, cache)  # under way while this one is printed
            yield int(token[0])
            token = following
        yield int(token[0])


class Text:
    """Tokens in, text out as soon as it is certain: whole characters, and no part of what may become a stop text."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        from tokenizers.decoders import DecodeStream

        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.end = tokenizer.token_to_id(END_OF_TEXT)
        self.stream = DecodeStream(skip_special_tokens=True)
        self.held = ""
        self.ended = False

    def add(self, token: int) -> str:
        """The text that is certain now; sets `ended` where a stop text, which is left out, or the end came."""
        if token == self.end:
            self.ended = True
            return self.rest()
        self.held += self.stream.step(self.tokenizer, token) or ""
        found = [self.held.index(stop) for stop in self.stops if stop in self.held]
        if found:
            self.ended = True
            self.held = self.held[: min(found)]
            return self.rest()
        # A stop text may have begun: hold the longest end of the text that begins one.
        holds = (n for n in range(len(self.held), 0, -1) if any(stop.startswith(self.held[-n:]) for stop in self.stops))
        keep = len(self.held) - next(holds, 0)
        certain, self.held = self.held[:keep], self.held[keep:]
        return certain

    def rest(self) -> str:
        """What was held back."""
        rest, self.held = self.held, ""
        return rest


if __name__ == "__main__":
    sys.exit(programs.run(main, PROGRAM))
