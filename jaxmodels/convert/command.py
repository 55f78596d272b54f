"""Command `jaxmodels convert`: its arguments, and the dispatch to `operations`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmodels.process import programs
from jaxmodels.process.arguments import Parser
from jaxmodels.process.failures import memory_naming
from jaxmodels.process.texts import visible

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
  jaxmodels inspect EleutherAI/pythia-70m --revision step3000
  jaxmodels convert neox 20B_checkpoints/ OUT/ --to flax --dtype bfloat16
  jaxmodels convert neox 20B_checkpoints/ HF/ --to hf --vocab 50277
  jaxmodels convert neox HF/ SHARDS/ --to neox --model-parallel 4
  jaxmodels convert neox SHARDS/ OUT/ --to flax --config pythia_70m
  jaxmodels convert neox RUN/ HF/ --to hf
  jaxmodels quantize HF/ OUT/
  jaxmodels verify HF/ SHARDS/

SRC is a folder of jaxmodels.save, a training run, GPT-NeoX shards, a Hugging Face folder, or the id of a model on the
Hub; which of them is detected. Tokenizer files and token ids beside the weights are written beside them again. OUT/ is
for `jaxmodels.load("OUT/")`.
"""

OVERWRITE = "replace DST, which must be a checkpoint, with everything in it"
TO = "format of DST; peft: only the adapter of a run that was trained with --tune lora"
FLOATS = ["float32", "bfloat16", "float16"]


def parser(prog: str) -> argparse.ArgumentParser:
    """Arguments of the command."""
    arguments = Parser(prog=prog, description="Convert and compare checkpoints of PyTorch and Flax, bit for bit.")
    formats = arguments.add_subparsers(dest="format", required=True, metavar="FORMAT")
    pt = formats.add_parser(
        "torch",
        help="convert a state_dict in a .pt file to a Flax checkpoint, or back",
        description="Convert FILE.pt to the folder of a Flax checkpoint, or a folder of any kind to FILE.pt.",
        epilog=TORCH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pt.add_argument("source", metavar="SRC", help="FILE.pt; or a folder of any kind, or the id of a model on the Hub")
    pt.add_argument("target", type=Path, metavar="DST", help="folder to write, or FILE.pt")
    pt.add_argument("--model", choices=sorted(NAMES), help="model in FILE.pt")
    pt.add_argument("--config", metavar="JSON", help="arguments of the model: a JSON file, or a JSON object")
    pt.add_argument("--key", help="entry of FILE.pt with the state_dict, if the file holds more")
    pt.add_argument("--dtype", choices=FLOATS, help="cast floating tensors (default: keep every bit)")
    pt.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    add_source_flags(pt)
    add_neox(formats)
    return arguments


def add_source_flags(command: argparse.ArgumentParser) -> None:
    """Add the flags that say how to open SRC."""
    command.add_argument(
        "--revision", metavar="NAME", help="branch, tag or commit of a model on the Hub (default: main)"
    )
    command.add_argument(
        "--strip-prefix",
        metavar="PREFIX",
        help="beginning of the tensors' names to remove, such as module. or _orig_mod. (not of Flax folders)",
    )
    command.add_argument(
        "--variant", metavar="NAME", help="variant of the weights, such as fp16 (Hugging Face folders)"
    )


def add_neox(formats: Any) -> None:
    """Add the subcommands for GPT-NeoX checkpoints."""

    def add(name: str, **texts: str) -> argparse.ArgumentParser:
        command = formats.add_parser(
            name, epilog=NEOX_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, **texts
        )
        command.add_argument("source", metavar="SRC", help="folder of a checkpoint, or the id of a model on the Hub")
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
        add_source_flags(command)
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
        help="print kind, configuration, token ids and files of a checkpoint",
        description="Print kind and configuration of a checkpoint, which of its values were inferred, token ids, and "
        "the files beside the weights.",
    )
    verify = add(
        "verify",
        help="compare two checkpoints",
        description="Compare bit for bit, SRC cast to DST's dtype, and the configurations; the exit code is 1 if a "
        "tensor or a setting differs.",
    )
    verify.add_argument("target", metavar="DST", help="checkpoint to compare with, of any kind")
    add_changes(verify)
    quantize = add(
        "quantize",
        help="write a GPT-NeoX checkpoint with weights in 8 or 4 bits",
        description="Write SRC with its linear maps in 8 or 4 bits, for `jaxmodels.load` and generate.",
    )
    quantize.add_argument("target", type=Path, metavar="DST", help="folder to write")
    quantize.add_argument(
        "--kind",
        choices=["llm.int8", "weights", "weights-4"],
        default="llm.int8",
        help="llm.int8: the blocks' linear maps by LLM.int8; weights: those and the readout, with activations that are "
        "not rounded; weights-4: the same with 4-bit weights in groups of 128 (default: llm.int8)",
    )
    quantize.add_argument(
        "--threshold",
        type=float,
        help="of llm.int8: input features of this magnitude or larger are computed in 16 bits; 0: none (default: 6)",
    )
    quantize.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    add_changes(quantize)


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Run a conversion and return the exit code; `prog` is the command as typed."""
    options = parser(prog).parse_args(argv)

    def printed() -> int:
        with memory_naming(options.source):
            good, message = run(options)
        print(visible(message, keep="\n"))
        return 0 if good else 1

    return programs.run(printed, f"{prog} {options.format}")


def run(options: argparse.Namespace) -> tuple[bool, str]:
    """Run a subcommand; returns its success, and the text to print."""
    from jaxmodels.convert import operations

    if options.format == "torch":
        if Path(options.source).is_file() or options.model is not None:
            return True, operations.from_torch_file(options, NAMES)
        return True, operations.to_torch_file(options)
    with operations.float64_allowed():
        if options.format == "verify":
            return operations.verify(options)
        operation = {"neox": operations.neox, "inspect": operations.inspect, "quantize": operations.quantized}
        return True, operation[options.format](options)
