"""GPT-NeoX checkpoints as a `Source`: the configuration is found and checked, shards are merged when they are read."""

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.convert.companions import Companions
from jaxmodels.convert.neox.layout import (
    BLOCK,
    BLOCK_BUFFERS,
    EMBEDDING,
    FINAL_NORM,
    QKV,
    READOUT,
    READOUT_COLUMNS,
    REPLICA,
    ROW_BIAS,
    SKIPPED,
    VOCABULARY,
    Form,
    Name,
    drift,
    grouped,
    merged,
)
from jaxmodels.convert.neox.shards import LATEST, Shard, Shards, config_files, find_step, open_step
from jaxmodels.convert.neox.yaml import fields, read_yaml
from jaxmodels.convert.source import Source, named
from jaxmodels.io.bounded import errors_naming, read_object
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.neox.config import PRESETS
from jaxmodels.neox.sequential import check_buffer
from jaxmodels.process.texts import quoted, shortened, visible
from jaxmodels.weights.lazy import Cut, read
from jaxmodels.weights.names import listed
from jaxmodels.weights.place import Shardings

MAX_DRIFT = 1e-2
SPARE = 100  # layers that may be missing before they are not listed by number
DIVISIBLE_BY = 128
RANKS = 8  # accept the vocabulary padding of up to this many ranks, also if the files are of fewer
ROW_BIASES = ("sum", "mean", "first")
# A file of its own next to the YAML files, because GPT-NeoX refuses unknown keys in those.
VOCABULARY_FILE = "vocabulary.json"
# Fields that follow from the tensors' names and shapes.
SIZES = ("n_layers", "n_hidden", "n_ff", "tied", "norm", "attention_bias", "ffn_bias")


class ReplicaDriftWarning(UserWarning):
    """Warning that ranks differ by more than 1e-2 in a tensor that should be equal; their mean was taken."""


class InferredWarning(UserWarning):
    """Warning that a configuration was inferred from sizes, or contradicts the rows of the vocabulary."""


def load_neox(
    folder: str | os.PathLike,
    config: NeoXConfig | None = None,
    dtype: Any = None,
    shardings: Shardings | None = None,
    layers: Any = None,
    row_bias: str | None = None,
) -> NeoX:
    """Load the model of a GPT-NeoX checkpoint of any model-parallel degree.

    folder: the folder with `latest`, or that of a step.
    config: default from the YAML files, or, without them, the preset with the same sizes.
    dtype: cast the tensors; default their own dtype.
    shardings: function of path and shape; each device's slice is read directly from the memory-mapped shards.
    layers: numbers of the blocks to keep; default all.
    row_bias: how to merge per-rank biases of row-parallel layers, 'sum', 'mean' or 'first'; default GPT-NeoX's own
        rule, sum with the parallel residual, else first.

    Raises ValueError, naming the file, if a shard is missing, damaged or misshapen or contains code, or if the
    configuration is incomplete or contradicts the tensors. Emits ReplicaDriftWarning, and InferredWarning if a preset
    was used or n_vocab cuts rows that are not zero.
    """
    source = open_neox(folder, config, row_bias)
    for doubt in source.doubts:
        warnings.warn(visible(doubt), InferredWarning, stacklevel=2)
    return source.with_layers(layers).model(dtype, shardings)


def open_neox(
    folder: str | os.PathLike,
    config: NeoXConfig | None = None,
    row_bias: str | None = None,
    strip_prefix: str | None = None,
) -> Source:
    """Open a checkpoint without reading its values; arguments and errors are those of `load_neox`.

    strip_prefix: words to remove from the names of tensors, such as "module.".
    """
    if row_bias is not None and row_bias not in ROW_BIASES:
        raise ValueError(f"row_bias={row_bias!r} must be one of {', '.join(ROW_BIASES)}")
    folder = Path(folder)
    shards = open_step(find_step(folder), strip_prefix)
    files = config_files(folder, shards.step)
    settings = read_yaml(files) if files else {}
    form = form_of(shards)
    parts = by_name(shards, form)
    rows, padding = vocabulary(shards, parts, settings)
    written_vocab = read_vocabulary(files[0].parent / VOCABULARY_FILE, rows) if files else None
    preset = config is None and not files
    n_vocab = rows - padding if written_vocab is None else written_vocab
    config, notes = resolved(shards, parts, form, n_vocab, config, settings, files)
    doubts = notes[:] if preset else []
    check_vocabulary(shards, config, rows, settings)
    if config.kv_heads % shards.ranks:
        raise ValueError(
            f"{shards.step}: n_kv_heads={config.kv_heads} is not divisible by the {shards.ranks} model-parallel ranks "
            "of the files"
        )
    for layer in shards.layers.values():
        for shard in layer:
            check_buffers(shard, config)

    if row_bias is None:
        row_bias = "sum" if config.parallel_residual else "first"
    tensors, problems = {}, []
    for key, shape in named(config).items():
        name, held, where = parts[key]
        tensor = merged(name, held, row_bias, key)
        if name.merge in (VOCABULARY, READOUT_COLUMNS) and tensor.shape[0] != config.n_vocab:
            tensor = Cut(tensor, 0, 0, config.n_vocab)
        if tuple(tensor.shape) != shape:
            problems.append(f"{where[0].file.name}: {name.disk[0]} gives {list(tensor.shape)}, expected {list(shape)}")
        tensors[key] = grouped(held, config) if name.merge == QKV and config.n_kv_heads is not None else tensor
    if problems:
        raise ValueError(f"{shards.step} contradicts its configuration: {listed(problems)}")
    if config.n_kv_heads is not None:
        notes.append(f"query_key_value is read as GPT-NeoX writes n_kv_heads={config.n_kv_heads} since November 2024")
    notes += drifting(parts, row_bias, shards)
    if config.n_vocab == written_vocab != rows:
        notes.append(f"{rows - written_vocab} of {rows} rows of the vocabulary are padding and were left out")
    elif padding and config.n_vocab == rows - padding:
        notes.append(f"{padding} of {rows} rows of the vocabulary are padding (zero) and were left out")
    elif config.n_vocab != rows:
        change = "cut" if config.n_vocab < rows else "padded"
        notes.append(f"the vocabulary's {rows} rows are {change} to {config.n_vocab}")
        lost = int((~zero_rows(parts, min(rows, config.n_vocab))).sum())
        if lost:
            notes[-1] += f"; {lost} of the rows left out are not zero"
            doubts.append(notes[-1])
    ranks = settings.get("model_parallel_size", shards.ranks)
    if ranks != shards.ranks:
        notes.append(f"model_parallel_size={quoted(ranks)} in the configuration, the files are of {shards.ranks} ranks")
    layout = f"{shards.layout} of {shards.ranks} model-parallel rank{'s'[: shards.ranks > 1]} in {shards.step.name}"
    companions = Companions.of(folder, *({shards.step} - {folder}))
    opened = {shard.file for layer in shards.layers.values() for shard in layer}
    opened |= {folder / LATEST, *files, *(file.with_name(VOCABULARY_FILE) for file in files)}
    return Source("neox", folder, config, tensors, layout, tuple(notes), tuple(doubts), companions, tuple(opened))


OF_BLOCK = {name.twin for name in BLOCK}
Parts = Mapping[str, tuple[Name, list[Any], list[Shard]]]  # by the twin's name: the tensor of each rank, and its file


def form_of(shards: Shards) -> Form:
    """Kind of norm and biases of the blocks, from the names of all tensors."""
    held = [shard.tensors.items() for ranks in shards.layers.values() for shard in ranks]
    return Form.held({name for items in held for name, tensor in items if tensor is not None})


def by_name(shards: Shards, form: Form) -> dict[str, tuple[Name, list[Any], list[Shard]]]:
    """All tensors by the twin's names; raises ValueError listing what is missing, unexpected or unequal."""
    problems: list[str] = []
    found: dict[str, tuple[Name, list[Any], list[Shard]]] = {}
    for layer, names in tables(shards, form).items():
        ranks = shards.layers[layer]
        known = [held_by(shard, names, problems) for shard in ranks]
        for name in names:
            if all(name.twin in held for held in known):
                parts = [held[name.twin] for held in known]
                if len({(tuple(part.shape), str(part.dtype)) for part in parts}) > 1:
                    kinds = ", ".join(f"{list(part.shape)} {part.dtype}" for part in parts)
                    problems.append(f"{ranks[0].file.name}: {name.disk[0]} differs between ranks: {kinds}")
                elif len(shape := parts[0].shape) != name.ndim:
                    axes = f"{name.ndim} dimension{'s'[: name.ndim > 1]}"
                    problems.append(f"{ranks[0].file.name}: {name.disk[0]} has shape {list(shape)}, expected {axes}")
                key = f"layers.{layer - 2}.{name.twin}" if name.twin in OF_BLOCK else name.twin
                found[key] = (name, parts, ranks)
    if problems:
        raise ValueError(f"{shards.step} does not hold the tensors of a GPT-NeoX model: {listed(problems)}")
    if READOUT[0].twin in found and shards.ranks > 1:
        name, held, where = found[READOUT[0].twin]
        n_hidden = found[FINAL_NORM[0].twin][1][0].shape[0]
        if held[0].shape[-1] * shards.ranks == n_hidden:  # output_layer_parallelism: row
            found[name.twin] = (name._replace(merge=READOUT_COLUMNS), held, where)
    return found


def tables(shards: Shards, form: Form) -> dict[int, tuple[Name, ...]]:
    """Rows of the table for each layer number; raises ValueError if a number is missing or unexpected."""
    final_norm = form.rows(FINAL_NORM)
    known = final_norm[0].disk
    norms = [layer for layer, ranks in shards.layers.items() if not ranks[0].tensors.keys().isdisjoint(known)]
    if len(norms) != 1 or norms[0] < 4:
        raise ValueError(f"{shards.step} must have {known[0]} in one layer from number 4 on, not in {quoted(norms)}")
    norm = norms[0]
    if norm > 2 * len(shards.layers) + SPARE:  # before any list of that length is made
        raise ValueError(f"{shards.step} has layer files up to number {norm}, but only {len(shards.layers)} of them")
    expected: dict[int, tuple[Name, ...]] = (
        {0: EMBEDDING} | dict.fromkeys(range(2, norm - 1), form.rows(BLOCK)) | {norm: final_norm}
    )
    if norm + 1 in shards.layers:
        expected[norm + 1] = READOUT
    missing, extra = sorted(expected.keys() - shards.layers.keys()), sorted(shards.layers.keys() - expected.keys())
    if missing:
        raise ValueError(f"{shards.step} lacks layer {numbers(missing)} of 00 to {norm:02}")
    if extra:
        raise ValueError(f"{shards.step} has layer {numbers(extra)}; the final norm is {norm:02}")
    return expected


def numbers(layers: list[int]) -> str:
    """Numbers of layers as in the names of files, at most ten of them."""
    shown = [shortened(f"{layer:02}", 40) for layer in layers[:10]]
    return ", ".join(shown) + (f" and {len(layers) - 10} more" if len(layers) > 10 else "")


def held_by(shard: Shard, names: tuple[Name, ...], problems: list[str]) -> dict[str, Any]:
    """Tensors of a shard by the twin's names; appends what is missing or unexpected to `problems`."""
    left = {name: tensor for name, tensor in shard.tensors.items() if not SKIPPED.fullmatch(name)}
    for buffer in BLOCK_BUFFERS:
        left.pop(buffer, None)
    held = {}
    for name in names:
        present = [disk for disk in name.disk if left.get(disk) is not None]
        if present:
            held[name.twin] = left.pop(present[0])
        else:
            problems.append(f"{shard.file.name}: missing {name.disk[0]}")
    problems += [f"{shard.file.name}: unexpected {name}" for name, tensor in left.items() if tensor is not None]
    return held


def vocabulary(shards: Shards, parts: Parts, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Number of rows on disk, and how many at their end are padding: zero in embedding and readout."""
    embedding, *readout = vocabulary_tables(parts)
    rows = embedding.shape[0]
    if any(table.shape[0] != rows for table in readout):
        raise ValueError(
            f"{shards.step}: the embedding has {rows} rows, the readout {readout[0].shape[0]}; they must be equal"
        )
    if not rows:
        raise ValueError(f"{parts[EMBEDDING[0].twin][2][0].file}: the embedding has no rows, must have one or more")
    limit = min(rows, shards.ranks * divisible_by(settings)) - 1  # padding is never longer
    zero = zero_rows(parts, rows - limit)
    return rows, limit if zero.all() else int(zero[::-1].argmin())


def vocabulary_tables(parts: Parts) -> list[Any]:
    """Tables with a row per token: embedding and, unless it is tied, readout."""
    return [merged(*parts[key][:2], "sum") for key in ("embedding.emb.weight", "readout.linear.weight") if key in parts]


def zero_rows(parts: Parts, start: int) -> np.ndarray:
    """Mask of the vocabulary's rows from `start` on that are zero in embedding and readout."""
    found = vocabulary_tables(parts)
    zero = np.ones(found[0].shape[0] - start, bool)
    for table in found:
        zero &= ~read(table, (slice(start, table.shape[0]), slice(0, table.shape[1]))).any(axis=1)
    return zero


def read_vocabulary(file: Path, rows: int) -> int | None:
    """Read the n_vocab that `save_neox` wrote; None if there is no such file.

    Raises ValueError, naming it, if n_vocab is not from 1 to the number of rows on disk.
    """
    if not os.path.lexists(file):
        return None
    try:
        n_vocab = read_object(file)["n_vocab"]
    except KeyError:
        raise ValueError(f"{file} must hold n_vocab") from None
    except ValueError as error:
        raise ValueError(f"{file} must hold n_vocab: {error}") from None
    if not isinstance(n_vocab, int) or isinstance(n_vocab, bool) or not 1 <= n_vocab <= rows:
        raise ValueError(f"{file} has n_vocab={quoted(n_vocab)}; it must be from 1 to the vocabulary's {rows} rows")
    return n_vocab


def divisible_by(settings: Mapping[str, Any]) -> int:
    """Multiple, per rank, to which the vocabulary was padded."""
    value = settings.get("make_vocab_size_divisible_by", DIVISIBLE_BY)
    return value if isinstance(value, int) and value > 0 else DIVISIBLE_BY


def check_vocabulary(shards: Shards, config: NeoXConfig, rows: int, settings: Mapping[str, Any]) -> None:
    """Raises ValueError if n_vocab differs from the number of rows by more than padding can explain."""
    padding = divisible_by(settings) * max(shards.ranks, RANKS)
    if abs(rows - config.n_vocab) >= padding:
        raise ValueError(
            f"{shards.step} has {rows} rows of vocabulary and n_vocab={config.n_vocab}; "
            f"padding explains a difference of less than {padding}"
        )


def resolved(
    shards: Shards,
    parts: Parts,
    form: Form,
    n_vocab: int,
    config: NeoXConfig | None,
    settings: Mapping[str, Any],
    files: list[Path],
) -> tuple[NeoXConfig, list[str]]:
    """Configuration of a checkpoint, and notes on its origin; raises ValueError if it contradicts the shapes."""
    sizes: dict[str, Any] = {
        "n_layers": sum(key.endswith(".attention.output.weight") for key in parts),
        "n_hidden": parts["final_norm.ln.weight"][1][0].shape[0],
        "n_ff": merged(*parts["layers.0.ffn.dense_h_h4.weight"][:2], "sum").shape[0],
        "tied": "readout.linear.weight" not in parts,
        **form._asdict(),
    }
    if config is not None:
        given = dataclasses.asdict(config) | {"n_ff": config.d_ff}
        check_sizes_match(sizes, given, f"{shards.step} contradicts config")
        return config, []
    if files:
        where = listed([file.name for file in files])
        found = fields(settings, str(files[0]) if len(files) == 1 else f"{files[0].parent} ({where})")
        if "n_heads" not in found:
            raise ValueError(
                f"{files[0].parent}: num_attention_heads is missing in {where}, and does not follow from shapes"
            )
        check_sizes_match(sizes, found, f"{shards.step} contradicts {where}")
        try:
            return NeoXConfig(**found | sizes, n_vocab=n_vocab), [f"configuration from {where}"]
        except ValueError as error:
            raise ValueError(f"{files[0].parent}: {error} (in {where})") from None
    for name, preset in PRESETS.items():
        known = preset()
        if sizes == {field: getattr(known, field) for field in SIZES} | {"n_ff": known.d_ff}:
            notes = [
                f"no configs/*.yml: the sizes match {name}, of which n_heads={known.n_heads}, rope_percentage="
                f"{known.rope_percentage}, activation={known.activation}, residual and epsilon were used"
            ]
            return dataclasses.replace(known, n_vocab=n_vocab), notes
    shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
    raise ValueError(
        f"{shards.step} has no configs/*.yml, and no preset has its sizes ({shown}); pass config with n_heads, "
        "n_kv_heads, rope_percentage, rope_base, activation, parallel_residual, layer_norm_eps, which do not follow "
        "from shapes"
    )


def check_sizes_match(sizes: Mapping[str, Any], given: Mapping[str, Any], what: str) -> None:
    """Raises ValueError, beginning with `what`, if sizes of the tensors differ from given ones."""
    wrong = [
        f"{name} is {sizes[name]}, expected {given[name]}"
        for name in SIZES
        if given.get(name, sizes[name]) != sizes[name]
    ]
    if wrong:
        raise ValueError(f"{what}: {'; '.join(wrong)}")


def check_buffers(shard: Shard, config: NeoXConfig) -> None:
    """Raises ValueError, naming the file, if stored rotary frequencies or masks contradict the configuration."""
    for name in BLOCK_BUFFERS:
        if (tensor := shard.tensors.get(name)) is not None:
            with errors_naming(shard.file):
                check_buffer(f"layers.{name}", tensor, config)


def drifting(parts: Parts, row_bias: str, shards: Shards) -> list[str]:
    """Notes on differences between replicas; emits ReplicaDriftWarning if one is large."""
    replicated = {REPLICA} | ({ROW_BIAS} if row_bias == "first" else set())
    found = {key: drift(held) for key, (name, held, _) in parts.items() if name.merge in replicated and len(held) > 1}
    far = {key: value for key, value in found.items() if not value <= MAX_DRIFT}
    if far:
        worst = max(far, key=far.__getitem__)
        warnings.warn(
            f"{visible(str(shards.step))}: {len(far)} tensors that should be equal on all ranks differ by more than "
            f"{MAX_DRIFT}, {worst} by {far[worst]:.3g}; norms are averaged, so that the model differs from that of "
            "every rank",
            ReplicaDriftWarning,
            stacklevel=3,
        )
    largest = max(found.values(), default=0.0)
    return [f"replicas differ by up to {largest:.3g}; norms are their mean"] if largest else []
