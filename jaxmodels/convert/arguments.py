"""What `python -m jaxmodels.convert` takes."""

import argparse
import json
from pathlib import Path
from typing import Any

# What --model may name: the class, and the arguments that the name says. `synthesizer` leaves its kind to --config.
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
  python -m jaxmodels.convert torch --model rope --config model.json model.pt OUT/
  python -m jaxmodels.convert torch --model synthesizer model.pt OUT/ \\
      --config '{"attention": "random+dense", "max_len": 512, "n_vocab": 65, "d_model": 128, "heads": 16,
                 "d_ff": 512, "n_layers": 6}'
  python -m jaxmodels.convert torch OUT/ back.pt

OUT/ is an Orbax checkpoint with a config.json, for `jaxmodels.load("OUT/")`.
"""

NEOX_EXAMPLES = """\
examples:
  python -m jaxmodels.convert inspect 20B_checkpoints/
  python -m jaxmodels.convert neox 20B_checkpoints/ OUT/ --to flax --dtype bfloat16
  python -m jaxmodels.convert neox 20B_checkpoints/ HF/ --to hf --vocab 50277
  python -m jaxmodels.convert neox HF/ SHARDS/ --to neox --model-parallel 4
  python -m jaxmodels.convert neox SHARDS/ OUT/ --to flax --config pythia_70m
  python -m jaxmodels.convert verify HF/ SHARDS/

OUT/ is for `jaxmodels.load("OUT/")`. SRC's format is detected.
"""

OVERWRITE = "replace DST as a whole: a folder with everything in it, which must be a checkpoint"


def parser(prog: str) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog=prog,
        description="Converts and compares checkpoints of PyTorch and Flax, bit for bit.",
    )
    formats = arguments.add_subparsers(dest="format", required=True, metavar="FORMAT")
    pt = formats.add_parser(
        "torch",
        help="a state_dict in a .pt file, to a Flax checkpoint and back",
        description="Converts FILE.pt to a Flax checkpoint folder; given such a folder as the source, writes FILE.pt.",
        epilog=TORCH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pt.add_argument("source", type=Path, metavar="SRC", help="FILE.pt, or the folder of a Flax checkpoint")
    pt.add_argument("target", type=Path, metavar="DST", help="the folder to write, or FILE.pt")
    pt.add_argument("--model", choices=sorted(NAMES), help="what FILE.pt holds")
    pt.add_argument("--config", metavar="JSON", help="the model's arguments: a JSON file, or the JSON itself")
    pt.add_argument("--key", help="the entry of FILE.pt that holds the state_dict, where it holds more")
    pt.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="cast to it (default: keep every bit)")
    pt.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    add_neox(formats)
    return arguments


def add_neox(formats: Any) -> None:
    """The commands over GPT-NeoX checkpoints, which are in `commands`."""

    def command(name: str, **texts: str) -> argparse.ArgumentParser:
        one = formats.add_parser(
            name, epilog=NEOX_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, **texts
        )
        one.add_argument("source", type=Path, metavar="SRC", help="a checkpoint's folder, in any of the three formats")
        one.add_argument("--config", metavar="CONFIG", help="where SRC has no configs/*.yml: a preset, or JSON")
        one.add_argument("--row-bias", choices=["sum", "mean", "first"], help="merge the ranks' row biases otherwise")
        return one

    def how(one: argparse.ArgumentParser) -> None:
        one.add_argument("--vocab", type=int, metavar="N", help="keep the first N tokens: what the tokenizer has")
        one.add_argument(
            "--dtype", choices=["float32", "bfloat16", "float16"], help="cast to it (default: keep each bit)"
        )

    convert = command(
        "neox",
        help="GPT-NeoX checkpoints: its own shards, transformers' safetensors, Flax",
        description="Converts a GPT-NeoX or Pythia checkpoint of any size, a few megabytes or a block at a time.",
    )
    convert.add_argument("target", type=Path, metavar="DST", help="the folder to write")
    convert.add_argument("--to", choices=["flax", "hf", "neox"], required=True, help="the format of DST")
    convert.add_argument("--model-parallel", type=int, default=2, metavar="K", help="ranks of --to neox (default 2)")
    convert.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    how(convert)
    command(
        "inspect",
        help="what a GPT-NeoX checkpoint is",
        description="Prints what a checkpoint is, and what was inferred.",
    )
    verify = command(
        "verify",
        help="whether two GPT-NeoX checkpoints are the same model",
        description="Compares bit for bit, SRC cast to DST's dtype; the exit code is 1 where a tensor differs.",
    )
    verify.add_argument("target", type=Path, metavar="DST", help="the checkpoint to compare with")
    how(verify)


def read_json(config: str) -> dict[str, Any]:
    """A JSON object, from the text itself or from the file of that name; raises ValueError where it is none."""
    text = config
    if not config.lstrip().startswith("{"):
        try:
            text = Path(config).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--config {config} is neither a JSON object nor a readable file: {error}") from None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--config {config} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"--config {config} must be a JSON object of the model's arguments")
    return value
