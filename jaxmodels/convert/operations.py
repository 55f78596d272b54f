"""`neox`, `inspect` and `verify` of the command line: GPT-NeoX checkpoints of three formats."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.convert.arguments import read_json
from jaxmodels.convert.flax import open_flax, write_flax
from jaxmodels.convert.hf import open_hf, write_hf
from jaxmodels.convert.neox.read import open_neox
from jaxmodels.convert.neox.write import check_ranks, write_neox
from jaxmodels.convert.source import Source, part
from jaxmodels.io.atomic import check_target
from jaxmodels.neox.config import PRESETS, NeoXConfig
from jaxmodels.weights.lazy import nbytes, pieces
from jaxmodels.weights.progress import progress_bar

PIECE_BYTES = 8_000_000


def neox(options: argparse.Namespace) -> str:
    """SRC -> DST, a few megabytes or a block at a time. Everything is checked before anything is written."""
    check_target(options.target, overwrite=options.overwrite, source=options.source)
    source = prepared(options)
    if options.to == "neox":
        check_ranks(source.config, options.model_parallel)
        write_neox(source, options.target, options.model_parallel, overwrite=options.overwrite)
    elif options.to == "hf":
        write_hf(source, options.target, overwrite=options.overwrite)
    else:
        write_flax(source, options.target, overwrite=options.overwrite)
    notes = "".join(f"\n  note: {note}" for note in source.notes)
    return f"{options.target}: NeoX as {options.to}, {totals(source)}{notes}"


def inspect(options: argparse.Namespace) -> str:
    """What a checkpoint is."""
    source = open_checkpoint(options.source, read_neox_config(options.config), options.row_bias)
    lines = [f"{options.source}: {source.format} ({source.layout}), {totals(source)}"]
    shown = dataclasses.asdict(source.config) | {"n_ff": source.config.d_ff}
    lines += [f"  {name:18} {value}" for name, value in shown.items() if name not in ("dtype", "remat")]
    lines.append(f"  {'largest layer':18} {largest_layer(source) / 1e6:,.1f} MB")
    lines += [f"  note: {note}" for note in source.notes]
    return "\n".join(lines)


def verify(options: argparse.Namespace) -> tuple[bool, str]:
    """Whether SRC and DST are the same model, and the tensors that differ. Where dtypes differ SRC is cast first."""
    source, target = prepared(options), open_checkpoint(options.target)
    config = dataclasses.asdict(source.config)
    different = [
        f"{name}: {config[name]} and {value}"
        for name, value in dataclasses.asdict(target.config).items()
        if config[name] != value and name not in ("dtype", "remat")
    ]
    if different:
        return False, f"{options.source} and {options.target} are of other configurations: {'; '.join(different)}"
    lines, compared = [], 0
    with progress_bar("comparing", source.tensors.values()) as advance:
        for name, tensor in source.tensors.items():
            other = target.tensors[name]
            if tensor.dtype != other.dtype:
                tensor = source.cast(other.dtype).tensors[name]
            count, largest = difference(tensor, other)
            compared += int(np.prod(tensor.shape))
            advance(nbytes(tensor))
            if count:
                lines.append(
                    f"  {name}: {count:,} of {int(np.prod(tensor.shape)):,} values differ, by up to {largest:.3g}"
                )
    if lines:
        return False, "\n".join([f"{len(lines)} of {len(source.tensors)} tensors differ:", *lines])
    return True, f"all {len(source.tensors)} tensors are equal, {compared:,} values bit for bit"


def difference(a: Any, b: Any) -> tuple[int, float]:
    """How many values of two tensors of one shape and dtype differ in any bit, and the largest difference."""
    count, largest = 0, 0.0
    for x, y in zip(pieces(a, PIECE_BYTES), pieces(b, PIECE_BYTES), strict=True):
        integer = np.dtype(f"u{x.dtype.itemsize}")
        unequal = x.view(integer) != y.view(integer)
        if unequal.any():
            count += int(unequal.sum())
            far = np.abs(x[unequal].astype(np.float64) - y[unequal].astype(np.float64))
            largest = float(np.maximum(largest, far.max()))  # and NaN where one of them is
    return count, largest


def prepared(options: argparse.Namespace) -> Source:
    source = open_checkpoint(options.source, read_neox_config(options.config), options.row_bias)
    source = source.with_vocabulary(options.vocab) if options.vocab is not None else source
    return source.cast(options.dtype) if options.dtype is not None else source


def open_checkpoint(folder: Path, config: NeoXConfig | None = None, row_bias: str | None = None) -> Source:
    """A checkpoint of any of the three formats. Raises ValueError where it is none of them."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    file = folder / "config.json"
    if not file.is_file():
        return open_neox(folder, config, row_bias)
    if config is not None or row_bias is not None:
        raise ValueError(f"--config and --row-bias are for GPT-NeoX's own shards; {file} has a configuration")
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    return open_hf(folder) if isinstance(said, dict) and "model_type" in said else open_flax(folder)


def read_neox_config(config: str | None) -> NeoXConfig | None:
    """A configuration from a preset's name, a JSON object or a JSON file."""
    if config is None:
        return None
    if config in PRESETS:
        return PRESETS[config]()
    try:
        return NeoXConfig(**read_json(config))
    except TypeError as error:
        raise ValueError(f"--config {config}: {error}; presets are {', '.join(PRESETS)}") from None


def totals(source: Source) -> str:
    parameters = sum(int(np.prod(tensor.shape)) for tensor in source.tensors.values())
    dtypes = ", ".join(sorted({np.dtype(tensor.dtype).name for tensor in source.tensors.values()}))
    return f"{parameters:,} parameters, {dtypes}, {source.nbytes() / 1e9:,.3f} GB"


def largest_layer(source: Source) -> int:
    """Bytes of the largest of embedding, blocks and readout."""
    layers: dict[tuple[int, int], int] = {}
    for name, tensor in source.tensors.items():
        layers[part(name)] = layers.get(part(name), 0) + nbytes(tensor)
    return max(layers.values())
