"""Writer of GPT-NeoX checkpoints."""

import contextlib
import errno
import functools
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.convert.neox.layout import BLOCK, EMBEDDING, FINAL_NORM, READOUT, VOCABULARY, Form, Name, split
from jaxmodels.convert.neox.read import DIVISIBLE_BY, VOCABULARY_FILE
from jaxmodels.convert.neox.shards import layer_file
from jaxmodels.convert.neox.yaml import settings_of, yaml_text
from jaxmodels.convert.source import Source, model_source
from jaxmodels.io.atomic import atomic_folder
from jaxmodels.io.pipeline import Progress, run_in_threads, start_writeback
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.process.extras import require
from jaxmodels.process.programs import interrupt_held
from jaxmodels.weights.lazy import Cut, values
from jaxmodels.weights.names import as_tensor
from jaxmodels.weights.progress import progress_bar

STEP = "global_step0"


def save_neox(model: NeoX, folder: str | os.PathLike, model_parallel: int = 2, *, overwrite: bool = False) -> None:
    """Write a model as a GPT-NeoX checkpoint of `model_parallel` ranks, atomically.

    The vocabulary is padded with zero rows to a multiple of 128 per rank, which `load_neox` removes. With the parallel
    residual each rank gets a share of the row biases; the shares sum to them exactly (in float64 from 6 ranks on, up to
    rounding). Raises ValueError if heads, heads of keys and values, or feed-forward width are not divisible by
    `model_parallel`, if the model is quantized, or, as `jaxmodels.save`, if the folder must not be written.
    """
    write_neox(model_source(model), folder, model_parallel, overwrite=overwrite)


def write_neox(source: Source, folder: str | os.PathLike, model_parallel: int = 2, *, overwrite: bool = False) -> None:
    """Write an open checkpoint as `save_neox` does; two files' tensors at most are in memory."""
    config = source.config
    check_ranks(config, model_parallel)
    with (
        atomic_folder(folder, overwrite=overwrite) as temporary,
        progress_bar(f"writing {Path(folder).name}", source.tensors.values()) as advance,
    ):
        step = temporary / STEP
        step.mkdir()
        write_shards(step, shards(source, model_parallel), advance)
        for rank in range(model_parallel):
            write_pt(step / f"mp_rank_{rank:02}_model_states.pt", rank_state(model_parallel))
        (temporary / "configs").mkdir()
        settings = settings_of(config, model_parallel, DIVISIBLE_BY)
        (temporary / "configs" / "model.yml").write_text(yaml_text(settings), encoding="utf-8")
        vocabulary = json.dumps({"n_vocab": config.n_vocab, **source.companions.in_config()}) + "\n"
        (temporary / "configs" / VOCABULARY_FILE).write_text(vocabulary, encoding="utf-8")
        source.companions.write(temporary)
        (temporary / "latest").write_text(STEP, encoding="utf-8")


def shards(source: Source, ranks: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Iterate over the names of all files and their tensors."""
    for layer, prefix, names in parts(source.config):
        tensors = [source.tensors[prefix + name.twin] for name in names]
        if names[0].merge == VOCABULARY:
            multiple = DIVISIBLE_BY * ranks
            tensors = [Cut(tensors[0], 0, 0, -(-source.config.n_vocab // multiple) * multiple)]
        shares = [split(name, tensor, ranks, source.config) for name, tensor in zip(names, tensors, strict=True)]
        for rank in range(ranks):
            yield (
                layer_file(layer, rank),
                {name.disk[0]: share[rank] for name, share in zip(names, shares, strict=True)},
            )


def write_shards(step: Path, files: Iterable[tuple[str, dict[str, Any]]], advance: Progress) -> None:
    """Write all files, two at a time; of these, tensors that are not on disk as they are written are in memory."""
    with warnings.catch_warnings():
        # Tensors are views of mapped files where possible, and torch warns of memory that is not writable.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        run_in_threads((functools.partial(write_shard, step / name, tensors) for name, tensors in files), advance)


def write_shard(file: Path, tensors: Mapping[str, Any]) -> int:
    """Write one file; returns the number of bytes of its tensors."""
    arrays = {key: values(tensor) for key, tensor in tensors.items()}
    write_pt(file, arrays)
    with file.open("rb") as written:
        start_writeback(written.fileno())
    return sum(array.nbytes for array in arrays.values())


def check_ranks(config: NeoXConfig, ranks: int) -> None:
    """Raises ValueError if a model cannot be divided over this number of ranks."""
    if not isinstance(ranks, int) or ranks < 1:
        raise ValueError(f"model_parallel={ranks!r} must be an integer of at least 1")
    for name, size in (("n_heads", config.n_heads), ("n_kv_heads", config.kv_heads), ("n_ff", config.d_ff)):
        if size % ranks:
            raise ValueError(f"{name}={size} is not divisible by model_parallel={ranks}")


def parts(config: NeoXConfig) -> list[tuple[int, str, tuple[Name, ...]]]:
    """Layer numbers on disk, prefixes of the twin's names, and rows of the table."""
    form = Form.of(config)
    blocks = [(i + 2, f"layers.{i}.", form.rows(BLOCK)) for i in range(config.n_layers)]
    end = config.n_layers + 3
    readout = [] if config.tied else [(end + 1, "", READOUT)]
    return [(0, "", EMBEDDING), *blocks, (end, "", form.rows(FINAL_NORM)), *readout]


def write_pt(file: Path, content: dict[str, Any]) -> None:
    """Write a file with `torch.save`; raises OSError, naming the file, e.g. if the disk is full."""
    require("torch", "torch")
    import torch

    tensors = {key: as_tensor(v) if isinstance(v, np.ndarray) else v for key, v in content.items()}
    # By name first: torch holds the GIL while it writes to a Python file. If that fails, its error does not say why, so
    # the file is written again through Python.
    with interrupt_held(), contextlib.suppress(RuntimeError):
        torch.save(tensors, file)
        return
    try:
        with interrupt_held(), file.open("wb") as out:
            torch.save(tensors, out)
    except (OSError, RuntimeError) as error:
        first: BaseException = error
        while first.__context__ is not None:  # torch's writer fails again when it is closed
            first = first.__context__
        number, why = (first.errno, first.strerror) if isinstance(first, OSError) else (None, None)
        raise OSError(number or errno.EIO, why or str(first), str(file)) from error


def rank_state(ranks: int) -> dict[str, Any]:
    """Content that DeepSpeed needs in each rank's file if the weights are in layer files."""
    counters = {"global_steps": 0, "global_samples": 0, "skipped_steps": 0, "iteration": 0}
    return {"module": {}, "optimizer": {}, "dp_world_size": 1, "mp_world_size": ranks} | counters
