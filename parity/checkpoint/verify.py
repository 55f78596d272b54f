"""The command `parity verify`: compare two checkpoints tensor by tensor, and by what their models compute."""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxmodels.io.bounded import errors_naming
from jaxmodels.process.arguments import Parser
from jaxmodels.process.extras import require
from jaxmodels.process.programs import run
from jaxmodels.process.texts import visible
from jaxmodels.weights.lazy import nbytes
from parity.cases.processes import prepare_jax

if TYPE_CHECKING:
    from parity.checkpoint.opened import Checkpoint
    from parity.report.report import Report

ROWS, TOKENS = 3, 61
NEIGHBORS = 2  # of each chunk, for RetroModel
MOST_TOKENS = 1024  # that a configuration alone asks for

EXAMPLES = """\
examples:
  {prog} pythia-160m/ OUT/                   every tensor, bit for bit
  {prog} pythia-160m/ OUT/ --numerics        also the outputs: PyTorch with the first, Flax with the second
  {prog} model.pt OUT/ --numerics --tokens 128

A checkpoint is a folder of `jaxmodels.save`, a training run, GPT-NeoX's shards, a GPT-NeoX in Hugging Face's format, or
a state_dict in a .pt or .safetensors file, for which the other side has the configuration.

Exit code: 0 if everything agrees, 1 if something differs, 2 after an error.
"""


def parser(prog: str) -> argparse.ArgumentParser:
    arguments = Parser(
        prog=prog,
        description="Compare two checkpoints: SRC, cast to DST's dtypes, with DST.",
        epilog=EXAMPLES.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument("source", type=Path, metavar="SRC", help="folder or file of a checkpoint")
    arguments.add_argument("target", type=Path, metavar="DST", help="checkpoint to compare with")
    arguments.add_argument(
        "--numerics",
        action="store_true",
        help="also compare outputs on random tokens: SRC in PyTorch, with transformers if it is a Hugging Face folder "
        "and transformers is installed, DST in Flax",
    )
    arguments.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help=f"length of the {ROWS} random sequences (default: {TOKENS}, or the model's max_len if that is less; "
        "two chunks of a RETRO model if they are more; required if that is more than "
        f"{MOST_TOKENS:,}, and for a model that makes large arrays of few weights)",
    )
    arguments.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the tokens (default: 0)")
    arguments.add_argument(
        "--device", choices=["cpu", "gpu", "tpu"], help="device for Flax (default: JAX's default device)"
    )
    arguments.add_argument(
        "--config",
        metavar="CONFIG",
        help="configuration of SRC, if it is shards without configs/*.yml: name of a preset, or JSON (default: DST's)",
    )
    arguments.add_argument(
        "--row-bias",
        choices=["sum", "mean", "first"],
        help="how to merge per-rank biases of SRC's row-parallel layers (default: GPT-NeoX's own rule)",
    )
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = "parity verify") -> int:
    """Run the command and return its exit code. prog: the command as typed, for its help and errors."""
    return run(lambda: verify(parser(prog).parse_args(argv)), prog)


def verify(options: argparse.Namespace) -> int:
    """Compare the tensors and, with --numerics, the outputs; print both."""
    for flag, least in (("tokens", 1), ("seed", 0)):
        value = getattr(options, flag)
        if value is not None and value < least:
            raise ValueError(f"--{flag} {value} must be at least {least}")
    require("torch", "torch")
    prepare_jax(options.device, eight=False)
    from jaxmodels.convert.compare import compare_tensors, different_settings
    from jaxmodels.convert.operations import read_neox_config
    from parity.checkpoint.pair import both_opened

    first, second = both_opened(options.source, options.target, read_neox_config(options.config), options.row_bias)
    for note in (*first.notes, *second.notes) if not options.numerics else ():
        print(visible(f"note: {note}"))
    same = True
    if different := different_settings(first.config, second.config):
        same = False
        print(visible(f"{first.where} and {second.where} have different configurations: {'; '.join(different)}"))
    equal, text = compare_tensors(first.tensors, second.tensors)
    print(visible(text, keep="\n"), flush=True)
    if shapes(first) != shapes(second):
        return 1  # their outputs cannot be compared
    report = None
    if options.numerics:
        from parity.report.progress import StatusLine

        with StatusLine() as line:
            report = numerics(first, second, options, line.show)
        print(report)
    return 0 if same and equal and (report is None or report.passed) else 1


def shapes(checkpoint: "Checkpoint") -> dict[str, tuple[int, ...]]:
    """Shape of every tensor."""
    return {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()}


def numerics(
    first: "Checkpoint", second: "Checkpoint", options: argparse.Namespace, progress: Callable[[str], None]
) -> "Report":
    """A check of outputs: the first checkpoint in PyTorch, the second in Flax."""
    from parity.compare.comparison import Comparison
    from parity.golden.work import check_work
    from parity.measure.check import read_check

    progress("loading")
    inputs = token_inputs(second, options.tokens, options.seed)
    comparison = Comparison.of(first, second, inputs, device=options.device, seed=options.seed)
    if options.tokens is None:
        with errors_naming(f"{second.where} needs --tokens N"):
            check_work(comparison.flax, comparison.inputs, nbytes=sum(map(nbytes, second.tensors.values())))
    name = f"{Path(first.where).name} (PyTorch), {Path(second.where).name} (Flax)"
    return read_check(comparison, name=name, readings=("output",), steps=0, progress=progress)


def token_inputs(checkpoint: "Checkpoint", tokens: int | None, seed: int) -> tuple[Any, ...]:
    """Random token ids for a language model, and random neighbors for a RetroModel."""
    from jaxmodels.models import model_class

    config = checkpoint.config
    longest = config.get("max_len") or TOKENS
    chunk = config["chunk_len"] if checkpoint.model == "RetroModel" else 0
    if tokens is not None and tokens < chunk:
        raise ValueError(
            f"--tokens {tokens} must be at least {chunk}, a chunk of the model: shorter texts have no neighbors"
        )
    if tokens is None and 2 * chunk > MOST_TOKENS:
        raise ValueError(
            f"{checkpoint.where} has chunk_len={chunk:,}: name a length with --tokens; without it, two chunks of at "
            f"most {MOST_TOKENS:,} tokens are compared"
        )
    tokens = max(min(TOKENS, longest), 2 * chunk) if tokens is None else tokens
    rng = np.random.default_rng(seed)
    draw = functools.partial(rng.integers, 0, config["n_vocab"])
    first_axis = model_class(checkpoint.model).sequence_axis == 0
    ids = draw((tokens, ROWS) if first_axis else (ROWS, tokens))
    return (ids, draw((ROWS, tokens // chunk, NEIGHBORS, 2 * chunk))) if chunk else (ids,)
