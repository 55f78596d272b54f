"""Command `jaxmodels generate`: continue prompts with a model of any kind of checkpoint.

No module imports this one but other entry points; it alone in this package may import `jaxmodels.convert`.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxmodels.io.bounded import errors_naming, read_text
from jaxmodels.process import programs
from jaxmodels.process.arguments import Parser
from jaxmodels.process.failures import memory_naming
from jaxmodels.process.streams import line_ended
from jaxmodels.process.texts import for_terminal, quoted, visible

PROGRAM = "python -m jaxmodels.generate"
EXAMPLES = """\
examples:
  jaxmodels generate EleutherAI/pythia-70m --prompt "The capital of France is"
  jaxmodels generate pythia-70m/ --prompt "def f(" --temperature 0.8 --top-p 0.95 --stop $'\\n\\n'
  jaxmodels generate chat/ --prompt-file question.txt --stop '<|im_end|>' --repetition-penalty 1.1
  jaxmodels generate runs/mine --prompt "KING" --prompt "QUEEN" --temperature 1 --num-sequences 3

One continuation is printed as it is written; several are printed when all are complete, each under a line such as
"--- prompt 1, sequence 2 ---". Texts go to standard output; the speed, without compilation time, to standard error.
Of a checkpoint's generation_config.json only the end tokens are used: sampling is set by the options alone.
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """Arguments of the command."""
    arguments = Parser(
        prog=prog,
        description="Continue prompts with a model. Greedy by default.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = arguments.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="folder of a model of this project, of a training run (its last checkpoint), of GPT-NeoX shards or in "
        "Hugging Face's format; or a Hub id",
    )
    add("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; repeatable")
    add(
        "--prompt-file",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="UTF-8 file with a text to continue, without its last newline; repeatable",
    )
    add(
        "--prompts",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="UTF-8 file with a text to continue in each line, or JSONL (.jsonl) with one in each object; blank lines "
        "are left out; repeatable",
    )
    add(
        "--prompt-field",
        default="prompt",
        metavar="NAME",
        help="field of JSONL objects with the text (default: prompt)",
    )
    add("--max-new-tokens", type=int, default=100, metavar="N", help="maximum number of new tokens (default: 100)")
    add("--temperature", type=float, default=0.0, help="sampling temperature; 0 is greedy (default: 0)")
    add_settings(arguments)
    add("--batch-size", type=int, default=16, metavar="N", help="sequences computed together, if several (default: 16)")
    add(
        "--quantize",
        choices=["llm.int8", "weights", "weights-4"],
        help="quantize a NeoX to 8 bits after the cast, or with weights-4 to 4 (see jaxmodels quantize)",
    )
    add("--int8", action="store_const", dest="quantize", const="llm.int8", help="the same as --quantize llm.int8")
    add(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="tokenizer.json, or a folder with one (default: that of SOURCE, or of its parent folder)",
    )
    add("--config", metavar="CONFIG", help="configuration of shards without a YAML file: name of a preset, or JSON")
    add("--row-bias", help="how to merge per-rank biases of row-parallel layers of shards (see jaxmodels convert)")
    add("--revision", help="branch, tag or commit of a Hub id")
    add("--strip-prefix", metavar="PREFIX", help="beginning of the tensors' names to remove, such as module.")
    add("--variant", help="variant of the weights' files, such as fp16")
    return arguments


def add_settings(arguments: argparse.ArgumentParser) -> None:
    """Add the options that `generate` and `sample` share."""
    add = arguments.add_argument
    add("--top-k", type=int, metavar="K", help="draw from the K most likely tokens (default: from all)")
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the fewest tokens whose probabilities reach P (default: from all)",
    )
    add(
        "--min-p",
        type=float,
        metavar="P",
        help="draw from tokens with at least P times the largest probability (default: from all)",
    )
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="divide the logits of tokens in the text so far, if positive, else multiply them (default: 1, off)",
    )
    add(
        "--logit-bias",
        action="append",
        default=[],
        metavar="ID=X",
        help="add X to the logit of a token; -inf excludes it; repeatable",
    )
    add("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="cast the weights (default: keep their dtype; on a CPU compute 16-bit ones in float32, exact and faster)",
    )
    add(
        "--num-return-sequences",
        "--num-sequences",
        type=int,
        default=1,
        metavar="N",
        help="continuations of each prompt (default: 1)",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="stop before this text, which may be or contain special tokens; repeatable",
    )
    add("--ignore-eos", action="store_true", help="go on after the model's end tokens")
    add(
        "--window",
        type=int,
        metavar="N",
        help="continue texts of N tokens from their last N/2 tokens; 0 for no limit (default: seq_len of a run that "
        "trained from scratch, else 0)",
    )
    add(
        "--experiment",
        metavar="MODULE",
        help="module or .py file of a run's experiment, such as my_project.experiment; it is imported, and registers "
        "its model",
    )
    add(
        "--embedder",
        metavar="NAME",
        help="embedder of a run's chunk index, such as bert:MODEL; required if it loads a model (default: n-grams)",
    )


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Continue prompts and return the exit code; `prog` is the command as typed."""
    options = parser(prog).parse_args(argv)
    return programs.run(lambda: memory_naming(options.source)(run)(options), prog)


def run(options: argparse.Namespace) -> None:
    """Check the arguments, read the model and print the texts; raises ValueError for a bad argument or file."""
    # Cheap checks first, so that an error is reported before a large checkpoint is read.
    from jaxmodels.convert.open import open_source
    from jaxmodels.convert.operations import read_neox_config
    from jaxmodels.text import TokenizerFile

    check(options)
    prompts = [*options.prompt, *map(read_prompt, options.prompt_file)]
    for file in options.prompts:
        prompts += read_prompts(file, options.prompt_field)
    if not prompts:
        raise ValueError("a prompt is required: --prompt TEXT, --prompt-file FILE or --prompts FILE")
    if options.tokenizer is not None:
        TokenizerFile.read(options.tokenizer)
    opened = open_source(
        options.source,
        config=read_neox_config(options.config),
        row_bias=options.row_bias,
        revision=options.revision,
        strip_prefix=options.strip_prefix,
        variant=options.variant,
    )
    options.report = True
    with errors_naming(opened.name):
        continue_prompts(opened, prompts, options)


def check(options: argparse.Namespace) -> None:
    """Raise ValueError if a setting is out of range."""
    from jaxmodels.generate.sampling import integer
    from jaxmodels.generate.text import check_stops
    from jaxmodels.process.seeds import seed_32

    settings_of(options)
    for name in ("max_new_tokens", "num_return_sequences", "batch_size"):
        integer(name, getattr(options, name))
    if options.window is not None and options.window != 0:
        integer("window", options.window, 2)
    options.seed = seed_32(options.seed)
    check_stops(options.stop)


def settings_of(options: argparse.Namespace) -> Any:
    """Sampling of the options; raises ValueError if one is out of range."""
    from jaxmodels.generate.sampling import Sampling

    bias: dict[int, float] = {}
    for given in options.logit_bias:
        token, _, value = given.partition("=")
        try:
            bias[int(token)] = float(value)
        except ValueError:
            raise ValueError(f"logit_bias={quoted(given)} must be ID=X, such as 13=-2.5 or 13=-inf") from None
    return Sampling(
        options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty, bias or None
    )


def read_prompt(file: Path) -> str:
    """Text of a prompt's file, without byte order mark and last newline; raises ValueError if it is not UTF-8."""
    return read_text(file).removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")


def read_prompts(file: Path, field: str) -> list[str]:
    """Texts of the lines, or of the JSON objects, of a file; raises ValueError, naming it, if there is none."""
    from jaxmodels.text.documents import kind_of, lines

    if kind_of(file) == "jsonl":
        found = [text for _, text, _, _ in lines(file, field, 0)]
    else:
        found = [line.removesuffix("\r") for line in read_text(file).removeprefix("\ufeff").split("\n") if line.strip()]
    if not found:
        raise ValueError(f"{file} has no prompts: every line is blank")
    return found


def continue_prompts(opened: Any, prompts: Sequence[str | None], options: argparse.Namespace) -> None:
    """Read the model and print the prompts with their continuations; None stands for the default prompt.

    Raises ValueError if a prompt cannot be encoded, or if the model cannot be read or does not fit the vocabulary.
    """
    import jax

    from jaxmodels.generate.api import Prompts, Shared, continue_many, continue_texts
    from jaxmodels.generate.many import supports

    vocabulary = opened.vocabulary(options.tokenizer)
    texts = [default_prompt(vocabulary) if prompt is None else prompt for prompt in prompts]
    ends = () if options.ignore_eos else None
    encoded = Prompts.of(texts, vocabulary, options.stop, ends, None)
    model, window = read_model(opened, options)
    check_vocabulary(opened, model, vocabulary, encoded.ids)
    longest = max(map(len, encoded.ids)) + options.max_new_tokens
    limit = getattr(getattr(model, "settings", None), "max_len", None)
    if limit is not None and longest > limit and (window is None or window > limit):
        warn(f"the text may exceed the max_len={limit} tokens of training")
    copies = options.num_return_sequences
    key = jax.random.key(options.seed)
    shared = Shared(model, options.max_new_tokens, settings_of(options), copies, None, window, key, options.dtype)
    if len(texts) * copies == 1:
        print_stream(shared, encoded, texts[0], options.report)
        return
    if len(texts) * copies > options.batch_size and window is None and supports(model):
        found = continue_many(shared, encoded, options.batch_size, [options.max_new_tokens] * len(texts))
    else:
        found = iter(continue_texts(shared, encoded, options.batch_size))
    for number, text in enumerate(found):
        prompt, copy = divmod(number, copies)
        written = for_terminal(f"{texts[prompt]}{text}", sys.stdout)
        print(f"--- prompt {prompt + 1}, sequence {copy + 1} ---\n{written}", flush=True)


def print_stream(shared: Any, prompts: Any, prompt: str, report: bool) -> None:
    """Print one prompt and its continuation as it is written; `report`: and the speed."""
    print(for_terminal(prompt, sys.stdout), end="", flush=True)
    with line_ended(), compile_times() as times:
        began = first = time.perf_counter()
        text, n, compiled_first = prompts.stream(prompts.ids[0]), 0, 0.0
        for token in shared.of_prompts(prompts, [0]).each():
            n += 1
            print(for_terminal(text.add(token[0]), sys.stdout), end="", flush=True)
            if n == 1:
                first, compiled_first = time.perf_counter(), sum(times)
            if text.ended:
                break
        ended, compiled = time.perf_counter(), sum(times)
        rest = text.rest()
    print(for_terminal(rest, sys.stdout), flush=True)
    if not report:
        return
    length = len(prompts.ids[0])
    read = max(1e-6, first - began - compiled_first)
    wrote = max(1e-6, ended - first - (compiled - compiled_first))
    rate = f"{(n - 1) / wrote:.1f} tokens/s" if n > 1 else "one token"
    print(
        f"{length} tokens read in {read:.3f} s ({length / read:.1f} tokens/s), {n} written ({rate}); "
        f"compiled in {compiled:.1f} s",
        file=sys.stderr,
    )


@contextlib.contextmanager
def compile_times() -> Iterator[list[float]]:
    """Seconds that JAX spends on tracing, lowering and compiling, one number for each event."""
    import jax

    times: list[float] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            times.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield times
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def read_model(opened: Any, options: argparse.Namespace) -> tuple[Any, int | None]:
    """Read the model, a NeoX with a list of layers, and find the window of `generate`.

    Raises ValueError if the checkpoint or an option of it is unusable.
    """
    from jaxmodels.neox import NeoX, quantize
    from jaxmodels.protocols import tell_left_out
    from jaxmodels.weights.precision import for_inference, say

    dtype = options.dtype
    if opened.is_quantized and dtype is not None:
        raise ValueError(f"--dtype={dtype} cannot be applied to the quantized model in {opened.name}")
    experiment, window = None, options.window or None
    if opened.kind == "run":
        from jaxmodels.training.runs.folder import experiment_of, read_about

        experiment = experiment_of(opened.folder, options.experiment, opened.model_name)
        if options.embedder is not None:
            experiment.use_embedder(options.embedder)
        if options.window is None and read_about(opened.folder).config.get("checkpoint") is None:
            window = max(2, experiment.config.seq_len)
    else:
        for flag in ("experiment", "embedder"):
            if getattr(options, flag) is not None:
                raise ValueError(f"--{flag} is for training runs; {opened.name} is not one")
    kind = getattr(options, "quantize", None)  # `sample` has no such option
    model = load_listed(opened, opened.compute_dtype(narrow=kind is None) if dtype is None else dtype)
    if kind is not None:
        if not isinstance(model, NeoX):
            raise ValueError(f"--quantize={kind} (--int8) is for a NeoX; {opened.name} holds a {opened.model_name}")
        model = quantize(model, kind=kind)
    if dtype is None:
        model = for_inference(model, override="--dtype", tell=say)
    if experiment is not None:
        model = experiment.generator(model, opened.folder)
    tell_left_out(model, opened.name)
    return model, window


def load_listed(opened: Any, dtype: str | None) -> Any:
    """Load the model; a NeoX that is not quantized directly with a list of layers, without a stacked copy."""
    from jaxmodels.neox import NeoX
    from jaxmodels.weights.place import load_tensors
    from jaxmodels.weights.stored import shapes_of

    if opened.model_name != "NeoX" or opened.is_quantized:
        return opened.model(dtype=dtype)
    source = opened.neox()
    abstract = shapes_of(lambda rngs: NeoX(source.config, stacked=False, rngs=rngs))
    return load_tensors(abstract, source.tensors, dtype, None, opened.folder.name)


def check_vocabulary(opened: Any, model: Any, vocabulary: Any, prompts: Iterable[Iterable[Any]]) -> None:
    """Raise ValueError if the vocabulary is another model's, or if a prompt has ids beyond the model's.

    Warns of added tokens and end tokens beyond the model's.
    """
    from jaxmodels.generate.loop import vocabulary_size
    from jaxmodels.protocols import check_decoding

    check_decoding(model)
    n_vocab, n_tokens = vocabulary_size(model), len(vocabulary)
    written = min(n_vocab, n_tokens)
    never = [token for token in vocabulary.eos if token >= written]
    if never:
        some = ", ".join(map(str, never[:5])) + ", …" * (len(never) > 5)
        warn(f"end tokens {some} of {opened.name} are ignored: only ids below {written} are written")
    if getattr(vocabulary, "n_model", n_tokens) > n_vocab:
        raise ValueError(
            f"the tokenizer has {n_tokens} tokens, the model n_vocab={n_vocab}; pass the model's own with --tokenizer"
        )
    if n_tokens > n_vocab:
        warn(f"the tokenizer's added tokens {n_vocab} to {n_tokens - 1} are beyond the model's n_vocab={n_vocab}")
    # Templates of a tokenizer add ids that it may not have itself.
    if beyond := sorted({int(token) for ids in prompts for token in ids if token >= n_vocab}):
        some = ", ".join(map(str, beyond[:5])) + ", …" * (len(beyond) > 5)
        raise ValueError(f"a prompt has the tokens {some}, beyond n_vocab={n_vocab} of {opened.name}")


def default_prompt(vocabulary: Any) -> str:
    """Default prompt that a vocabulary can encode: 'The ', a newline, or its first token."""
    for prompt in ("The ", "\n"):
        with contextlib.suppress(ValueError):
            vocabulary.encode(prompt)
            return prompt
    return vocabulary.decode([0])


def warn(message: str) -> None:
    print(f"generate: warning: {visible(message)}", file=sys.stderr)
