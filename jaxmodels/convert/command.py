"""Command `jaxmodels convert`: its arguments, and the dispatch to `operations`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmodels.process import programs

PROGRAM = "python -m jaxmodels.convert"
# Values of --model: the class, and the arguments that the name implies. For `synthesizer`, --config gives the kind.
NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "rope": ("AutoregressiveTransformer", {"attention": "rotary"}),
    "rope_value": ("AutoregressiveTransformer", {"attention": "rotary_value"}),
    "relative": ("AutoregressiveTransformer", {"attention": "relative"}),
    "plain": ("AutoregressiveTransformer", {"attention": "plain"}),
    "synthesizer": ("AutoregressiveTransformer", {}),
    "feedback": ("AutoregressiveModel", {"variant": "FeedbackTransformer"}),
    "feedback_kv": ("AutoregressiveModel", {"variant": "FeedbackTransformerKV"}),
    "retro": ("RetroModel", {}),
}

TORCH_EXAMPLES = """\
examples:
  jaxmodels convert torch --model rope --config model.json model.pt OUT/
  jaxmodels convert torch --model synthesizer model.pt OUT/ \\
      --config '{"attention": "random+dense", "max_len": 512, "n_vocab": 65, "d_model": 128, "heads": 16,
                 "d_ff": 512, "n_layers": 6}'
  jaxmodels convert torch OUT/ back.pt

OUT/ is an Orbax checkpoint with a config.json, for `jaxmodels.load("OUT/")`.
"""

NEOX_EXAMPLES = """\
examples:
  jaxmodels inspect 20B_checkpoints/
  jaxmodels convert neox 20B_checkpoints/ OUT/ --to flax --dtype bfloat16
  jaxmodels convert neox 20B_checkpoints/ HF/ --to hf --vocab 50277
  jaxmodels convert neox HF/ SHARDS/ --to neox --model-parallel 4
  jaxmodels convert neox SHARDS/ OUT/ --to flax --config pythia_70m
  jaxmodels verify HF/ SHARDS/

OUT/ is for `jaxmodels.load("OUT/")`. The format of SRC is detected.
"""

OVERWRITE = "replace DST, which must be a checkpoint, with everything in it"
TO = "format of DST; peft: only the adapter of a run that was trained with --tune lora"
FLOATS = ["float32", "bfloat16", "float16"]


def parser(prog: str) -> argparse.ArgumentParser:
    """Arguments of the command."""
    arguments = argparse.ArgumentParser(
        prog=prog, description="Convert and compare checkpoints of PyTorch and Flax, bit for bit."
    )
    formats = arguments.add_subparsers(dest="format", required=True, metavar="FORMAT")
    pt = formats.add_parser(
        "torch",
        help="convert a state_dict in a .pt file to a Flax checkpoint, or back",
        description="Convert FILE.pt to the folder of a Flax checkpoint, or such a folder to FILE.pt.",
        epilog=TORCH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pt.add_argument("source", type=Path, metavar="SRC", help="FILE.pt, or the folder of a Flax checkpoint")
    pt.add_argument("target", type=Path, metavar="DST", help="folder to write, or FILE.pt")
    pt.add_argument("--model", choices=sorted(NAMES), help="model in FILE.pt")
    pt.add_argument("--config", metavar="JSON", help="arguments of the model: a JSON file, or a JSON object")
    pt.add_argument("--key", help="entry of FILE.pt with the state_dict, if the file holds more")
    pt.add_argument("--dtype", choices=FLOATS, help="cast floating tensors (default: keep every bit)")
    pt.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    add_neox(formats)
    return arguments


def add_neox(formats: Any) -> None:
    """Add the subcommands for GPT-NeoX checkpoints."""

    def add(name: str, **texts: str) -> argparse.ArgumentParser:
        command = formats.add_parser(
            name, epilog=NEOX_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, **texts
        )
        command.add_argument("source", type=Path, metavar="SRC", help="folder of a checkpoint; the format is detected")
        command.add_argument(
            "--config",
            metavar="CONFIG",
            help="configuration of shards without configs/*.yml: name of a preset, or JSON",
        )
        command.add_argument(
            "--row-bias",
            choices=["sum", "mean", "first"],
            help="how to merge per-rank biases of row-parallel layers (default: GPT-NeoX's own rule)",
        )
        return command

    def add_changes(command: argparse.ArgumentParser) -> None:
        command.add_argument("--vocab", type=int, metavar="N", help="keep the first N rows of the vocabulary")
        command.add_argument(
            "--dtype",
            choices=FLOATS,
            help="cast the tensors (default: keep every bit; of a fine-tuned run: the dtype of its original)",
        )

    convert = add(
        "neox",
        help="convert a GPT-NeoX checkpoint: its own shards, transformers' safetensors, Flax",
        description="Convert a GPT-NeoX or Pythia checkpoint of any size; at most a few blocks are in memory.",
    )
    convert.add_argument("target", type=Path, metavar="DST", help="folder to write")
    convert.add_argument("--to", choices=["flax", "hf", "neox", "peft"], required=True, help=TO)
    convert.add_argument(
        "--model-parallel",
        type=int,
        default=2,
        metavar="K",
        help="number of model-parallel ranks, for --to neox (default: 2)",
    )
    convert.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    add_changes(convert)
    add(
        "inspect",
        help="print the configuration of a GPT-NeoX checkpoint",
        description="Print the configuration of a checkpoint, and which of its values were inferred.",
    )
    verify = add(
        "verify",
        help="compare two GPT-NeoX checkpoints",
        description="Compare bit for bit, SRC cast to DST's dtype; the exit code is 1 if a tensor differs.",
    )
    verify.add_argument("target", type=Path, metavar="DST", help="checkpoint to compare with")
    add_changes(verify)


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Run a conversion and return the exit code; `prog` is the command as typed."""
    options = parser(prog).parse_args(argv)

    def printed() -> int:
        good, message = run(options)
        print(message)
        return 0 if good else 1

    return programs.run(printed, f"{prog} {options.format}")


def run(options: argparse.Namespace) -> tuple[bool, str]:
    """Run a subcommand; returns its success, and the text to print."""
    from jaxmodels.convert import operations

    if options.format == "torch":
        if options.source.is_dir():
            return True, operations.to_torch_file(options)
        return True, operations.from_torch_file(options, NAMES)
    with operations.float64_allowed():
        if options.format == "verify":
            return operations.verify(options)
        return True, {"neox": operations.neox, "inspect": operations.inspect}[options.format](options)
