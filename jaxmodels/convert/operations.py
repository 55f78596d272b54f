"""Operations of `jaxmodels convert`, on the arguments that `command` parsed."""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxmodels
from jaxmodels.convert.companions import Companions
from jaxmodels.convert.compare import compare_tensors, different_settings
from jaxmodels.convert.flax import write_flax
from jaxmodels.convert.hf import write_hf
from jaxmodels.convert.kinds import NAMES
from jaxmodels.convert.neox.write import check_ranks, write_neox
from jaxmodels.convert.open import Opened, local_folder, open_source
from jaxmodels.convert.peft import write_peft
from jaxmodels.convert.source import Source, part
from jaxmodels.io.atomic import check_target
from jaxmodels.io.bounded import errors_naming, integer, parsed, read_json
from jaxmodels.io.checkpoint import read_config, stored_arrays
from jaxmodels.io.content import is_torch_file
from jaxmodels.io.formats.torch_files import read_state_dict, write_state_dict
from jaxmodels.models import abstract, check_arrays, load_saved
from jaxmodels.neox import NeoXConfig, quantize
from jaxmodels.neox.config import PRESETS
from jaxmodels.neox.lora import LoRA
from jaxmodels.process.paths import local, resolved
from jaxmodels.process.texts import quoted, shortened, visible
from jaxmodels.weights.lazy import nbytes
from jaxmodels.weights.names import flat_arrays, from_torch, to_torch
from jaxmodels.weights.prefixes import stripped
from jaxmodels.weights.stored import Stored

# Values of --model: the class, and the arguments that the name implies.
Names = Mapping[str, tuple[str, dict[str, Any]]]


def from_torch_file(options: argparse.Namespace, names: Names) -> str:
    """Convert FILE.pt to a folder. Everything is checked before anything is written."""
    source = Path(options.source)
    if not source.exists():
        raise ValueError(f"{source} does not exist")
    if options.model is None or options.config is None:
        raise ValueError(f"{options.source} is a .pt file; describe its model with --model and --config")
    for flag, of in (("revision", "models on the Hub"), ("variant", "Hugging Face folders")):
        if getattr(options, flag) is not None:
            raise ValueError(f"--{flag} is for {of}; {options.source} is a file")
    check_target(options.target, overwrite=options.overwrite, sources=[source])
    name, config = class_and_config(options.model, json_object(options.config), names)
    with float64_allowed():
        tensors = read_state_dict(source, options.key)
        if options.strip_prefix is not None:
            tensors, _ = stripped(tensors, options.strip_prefix, lambda name: True, str(source))
        described = abstract(name, config, Stored.of(tensors), "--config")
        with errors_naming(source):
            model = from_torch(described, tensors, options.dtype)
        jaxmodels.save(model, options.target, overwrite=options.overwrite)
        return f"{visible(str(options.target))}: {summary(name, model)}"


def to_torch_file(options: argparse.Namespace) -> str:
    """Convert a folder of any kind, or a model of the Hub, to FILE.pt."""
    local(options.target, "target")
    if options.target.is_dir():
        raise ValueError(f"{options.target} is a folder; expected a file")

    def check(*, content: bool = True) -> None:
        exists = options.target.exists()
        if options.target.is_symlink() and not exists:
            raise ValueError(f"{options.target} is a link that leads to nothing; choose another file")
        if exists and not options.overwrite:
            raise ValueError(f"{options.target} exists; choose another file, or pass --overwrite")
        if content and exists and not is_torch_file(options.target):
            raise ValueError(f"{options.target} is no file of torch.save; only such a file is overwritten")

    check(content=False)
    for flag in ("model", "config", "key"):
        if getattr(options, flag) is not None:
            raise ValueError(f"--{flag} describes a .pt file; {options.source} has a configuration")
    with float64_allowed():
        flags = {name: getattr(options, name) for name in ("revision", "strip_prefix", "variant")}
        opened = open_source(options.source, **flags)
        target, held = resolved(options.target), (opened.weights, *opened.files)
        if target.exists() and any(target.is_relative_to(resolved(path)) for path in held):
            raise ValueError(f"{options.target} lies in the weights of {options.source}; choose another file")
        check()
        if opened.is_quantized:
            raise ValueError(f"{opened.name} is quantized: it has no state_dict; name the model it was made from")
        model = opened.model(dtype=options.dtype)
        with errors_naming(options.source):
            tensors = to_torch(model)
        write_state_dict(options.target, tensors, check)
    return f"{visible(str(options.target))}: {summary(type(model).__name__, model)}"


def class_and_config(model: str, config: dict[str, Any], names: Names) -> tuple[str, dict[str, Any]]:
    """Class name and arguments for --model and --config; raises ValueError if they contradict each other.

    Shapes cannot show a contradiction: rotary, rotary_value and plain have the same parameters.
    """
    name, implied = names[model]
    if {"model", "config"} <= config.keys():  # a config.json written by jaxmodels.save
        if config["model"] != name:
            raise ValueError(f"--model {model} is a {name}, --config is for {config['model']}")
        config = config["config"]
    for argument, value in implied.items():
        if config.get(argument, value) != value:
            raise ValueError(f"--model {model} has {argument}={value!r}, --config has {quoted(config[argument])}")
    if model == "synthesizer" and config.get("attention") in (None, "rotary", "rotary_value", "relative", "plain"):
        raise ValueError(
            f"--model synthesizer needs the attention of a synthesizer in --config, not "
            f"{quoted(config.get('attention'))}"
        )
    return name, implied | config


def json_object(config: str) -> dict[str, Any]:
    """Value of --config: a JSON object, or the name of a file with one; raises ValueError if it is neither."""
    value: Any
    if config.lstrip().startswith("{"):
        try:
            value = parsed(config, parse_int=integer)
        except ValueError as error:
            raise ValueError(f"--config {config} is not JSON: {error}") from None
    else:
        try:
            value = read_json(Path(config))
        except ValueError as error:
            raise ValueError(f"--config must be a JSON object or a JSON file: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"--config {config} must be a JSON object of the model's arguments")
    return value


@contextlib.contextmanager
def float64_allowed() -> Iterator[None]:
    """Enable 64-bit types, so that float64 checkpoints stay float64; for all threads, as Orbax uses its own."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def summary(name: str, model: Any) -> str:
    """Name, size and dtypes of a model in memory."""
    arrays = list(flat_arrays(model).values())
    dtypes = ", ".join(sorted({str(array.dtype) for array in arrays}))
    return f"{name}, {parameters(model):,} parameters in {len(arrays)} arrays, {dtypes}"


def parameters(model: Any) -> int:
    """Number of a model's parameters; of a quantized one without the scales, and what weights are padded by."""
    if getattr(model, "quantization", None) is not None:
        return int(model.settings.parameters())
    return sum(array.size for array in flat_arrays(model).values())


def neox(options: argparse.Namespace) -> str:
    """Convert SRC to DST as a stream. Everything is checked before anything is written."""
    place = local_folder(options.source, options.revision, options.variant)
    check_target(options.target, overwrite=options.overwrite, sources=[place])
    if options.to == "peft":
        return adapter(options)
    source = prepared(open_outside(options), options)
    if options.to == "neox":
        check_ranks(source.config, options.model_parallel)
        write_neox(source, options.target, options.model_parallel, overwrite=options.overwrite)
    elif options.to == "hf":
        write_hf(source, options.target, overwrite=options.overwrite)
    else:
        write_flax(source, options.target, overwrite=options.overwrite)
    lines = [*beside(source.companions), *(f"note: {visible(note)}" for note in source.notes)]
    notes = "".join(f"\n  {line}" for line in lines)
    return f"{visible(str(options.target))}: NeoX as {options.to}, {totals(source)}{notes}"


def adapter(options: argparse.Namespace) -> str:
    """Write the adapter of a run in PEFT's format."""
    if options.vocab is not None or options.dtype is not None:
        raise ValueError("--vocab and --dtype are not for --to peft, which writes an adapter as it was trained")
    opened = open_outside(options)
    if opened.kind not in ("model", "run") or read_config(opened.weights)[0] != "LoRANeoX":
        raise ValueError(f"{options.source} has no LoRA adapter; --to peft needs a run with tune='lora'")
    model = load_saved(opened.weights)
    base = opened.original.get("source")
    with errors_naming(opened.weights):
        write_peft(model, options.target, base, opened.companions, overwrite=options.overwrite)
    about = f"{options.target}: LoRA adapter for PEFT, {described(model.lora)}; base model: {base or 'not known'}"
    return visible(about)


def adapter_in(folder: Path) -> LoRA | None:
    """Adapter that a model's config.json describes; raises ValueError, naming the file, if it is none."""
    settings = read_config(folder)[1]
    if "lora" not in settings:
        return None
    with errors_naming(folder / "config.json"):
        return LoRA.of(settings["lora"])


def described(lora: LoRA) -> str:
    """Hyperparameters of an adapter as a text."""
    return f"rank {lora.rank}, alpha {lora.alpha:g}, {', '.join(lora.targets)}"


def quantized(options: argparse.Namespace) -> str:
    """Write SRC with weights in 8 or 4 bits to DST."""
    if options.kind != "llm.int8" and options.threshold is not None:
        raise ValueError(f"--threshold={options.threshold:g} is for --kind llm.int8, not for --kind {options.kind}")
    place = local_folder(options.source, options.revision, options.variant)
    check_target(options.target, overwrite=options.overwrite, sources=[place])
    source = prepared(open_outside(options), options)
    with errors_naming(options.source):
        model = quantize(source.model(), options.threshold, kind=options.kind)
    jaxmodels.save(model, options.target, overwrite=options.overwrite, companions=source.companions)
    return f"{visible(str(options.target))}: {summary('NeoX', model)}"


def inspect(options: argparse.Namespace) -> str:
    """Describe a checkpoint of any kind."""
    found = open_given(options)
    where = [] if str(found.folder) == found.name else [("folder", str(found.folder))]
    if found.kind == "run":
        where.append(("step", found.weights.parent.name))
    if found.original:
        where.append(("original", f"{found.original['dtype']}, {found.original.get('source')}"))
    if found.kind in ("model", "run") and (lora := adapter_in(found.weights)) is not None:
        where.append(("merged adapter", described(lora)))
    source = found.source
    if source is None:
        stored = stored_arrays(found.weights)
        model = abstract(found.model_name, found.config, Stored.of(stored), found.weights / "config.json")
        with float64_allowed():
            check_arrays(found.weights, model, stored)
        what = f"{found.model_name}, {parameters(model):,} parameters"
        if found.is_quantized:
            what += ", 4 bits" if getattr(model, "quantization", None) == "weights-4" else ", int8"
        lines = [f"{visible(found.name)}: {NAMES[found.kind]}, {what}"]
        shown = dict(found.settings)
    else:
        lines = [f"{visible(found.name)}: {NAMES[found.kind]} ({source.layout}), {totals(source)}"]
        shown = dataclasses.asdict(source.config) | {"n_ff": source.config.d_ff, "n_kv_heads": source.config.kv_heads}
        where.append(("largest layer", f"{largest_layer(source) / 1e6:,.1f} MB"))
    shown = {name: value for name, value in shown.items() if name not in ("dtype", "remat")}
    lines += [f"  {name:18} {shortened(str(value), 300)}" for name, value in [*shown.items(), *where]]
    lines += [f"  {line}" for line in beside(found.companions)]
    lines += [f"  note: {visible(note)}" for note in (source.notes if source is not None else ())]
    return "\n".join(lines)


def beside(companions: Companions) -> list[str]:
    """Lines on token ids and files beside the weights."""
    ids = companions.token_ids
    known = {"eos": ", ".join(map(str, ids.eos)), "bos": ids.bos, "pad": ids.pad}
    shown = shortened("; ".join(f"{name} {value}" for name, value in known.items() if value not in (None, "")), 300)
    files = shortened(", ".join(companions.files), 1000)
    return [f"{name:18} {text}" for name, text in (("token ids", shown), ("files beside", files)) if text]


def verify(options: argparse.Namespace) -> tuple[bool, str]:
    """Compare SRC, cast to DST's dtypes, with DST; returns True if they are equal, and the text to print."""
    first, second = open_given(options), open_source(options.target)
    if first.model_name != "NeoX" or second.model_name != "NeoX":
        for flag in ("vocab", "dtype"):
            if getattr(options, flag) is not None:
                raise ValueError(f"--{flag} is for NeoX; {options.source} holds a {first.model_name}")
        ours, theirs = (side.model_name for side in (first, second))
        if ours != theirs:
            return False, visible(f"{options.source} holds a {ours}, {options.target} a {theirs}")
        one, two = first.model(), second.model()
        config, other = dict(first.settings), dict(second.settings)
        tensors: Mapping[str, Any] = to_torch(one)
        others: Mapping[str, Any] = to_torch(two)
    else:
        source, target = prepared(first, options), second.neox()
        config, other = dataclasses.asdict(source.config), dataclasses.asdict(target.config)
        tensors, others = source.tensors, target.tensors
    equal, text = compare_tensors(tensors, others)
    different = different_settings(config, other)
    if different:
        pair = visible(f"{options.source} and {options.target} have different configurations: {'; '.join(different)}")
        text = f"{pair}\n{text}"
    return equal and not different, text


def open_given(options: argparse.Namespace) -> Opened:
    """Open SRC with its flags."""
    return open_source(
        options.source,
        config=read_neox_config(options.config),
        row_bias=options.row_bias,
        revision=options.revision,
        strip_prefix=options.strip_prefix,
        variant=options.variant,
    )


def open_outside(options: argparse.Namespace) -> Opened:
    """Open SRC; raises ValueError if a file that is read, as of a run's last step or by a link, lies in the target."""
    found = open_given(options)
    check_target(options.target, overwrite=options.overwrite, sources=[found.weights, *found.files])
    return found


def prepared(opened: Opened, options: argparse.Namespace) -> Source:
    """Apply --vocab and --dtype; default the dtype of the checkpoint that a run fine-tuned."""
    source, dtype = opened.neox(), options.dtype or opened.original.get("dtype")
    source = source.with_vocabulary(options.vocab) if options.vocab is not None else source
    return source if dtype is None else source.cast(dtype)


def open_checkpoint(folder: Path, config: NeoXConfig | None = None, row_bias: str | None = None) -> Source:
    """Open a GPT-NeoX checkpoint of any kind; raises ValueError if it is another model's, or cannot be loaded."""
    return open_source(folder, config=config, row_bias=row_bias).neox()


def read_neox_config(config: str | None) -> NeoXConfig | None:
    """Configuration from --config: name of a preset, a JSON object or a JSON file; None if it is not given."""
    if config is None:
        return None
    if config in PRESETS:
        return PRESETS[config]()
    try:
        return NeoXConfig(**json_object(config))
    except TypeError as error:
        raise ValueError(f"--config {config}: {shortened(str(error))}; presets are {', '.join(PRESETS)}") from None


def totals(source: Source) -> str:
    """Number of parameters, dtypes and size of a checkpoint."""
    parameters = sum(int(np.prod(tensor.shape)) for tensor in source.tensors.values())
    dtypes = ", ".join(sorted({np.dtype(tensor.dtype).name for tensor in source.tensors.values()}))
    return f"{parameters:,} parameters, {dtypes}, {source.nbytes() / 1e9:,.3f} GB"


def largest_layer(source: Source) -> int:
    """Size in bytes of the largest among embedding, blocks and readout."""
    layers: dict[tuple[int, int], int] = {}
    for name, tensor in source.tensors.items():
        layers[part(name)] = layers.get(part(name), 0) + nbytes(tensor)
    return max(layers.values())
