"""A model as a GPT-NeoX checkpoint."""

import concurrent.futures
import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.convert.neox.layout import BLOCK, EMBEDDING, FINAL_NORM, READOUT, VOCABULARY, Name, split
from jaxmodels.convert.neox.read import DIVISIBLE_BY, VOCABULARY_FILE
from jaxmodels.convert.neox.shards import layer_file
from jaxmodels.convert.neox.yaml import settings_of, yaml_text
from jaxmodels.convert.source import Source, model_source
from jaxmodels.extras import require
from jaxmodels.io.atomic import atomic_folder, flush
from jaxmodels.io.safetensors import Progress
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.weights.lazy import Cut, read
from jaxmodels.weights.names import as_tensor
from jaxmodels.weights.progress import progress_bar

STEP = "global_step0"


def save_neox(model: NeoX, folder: str | os.PathLike, model_parallel: int = 2, *, overwrite: bool = False) -> None:
    """Writes a model as a GPT-NeoX checkpoint of `model_parallel` ranks, all of it or nothing.

    The vocabulary is padded with zero rows to a multiple of 128 for each rank, which `load_neox` leaves off again.
    Under the parallel residual each rank gets its share of the row biases, which sum to them exactly (in float64 from 6
    ranks on: to rounding). Raises ValueError where heads or feed-forward width are not divisible by `model_parallel`,
    and for a folder that is not empty unless `overwrite` is set.
    """
    write_neox(model_source(model), folder, model_parallel, overwrite=overwrite)


def write_neox(source: Source, folder: str | os.PathLike, model_parallel: int = 2, *, overwrite: bool = False) -> None:
    """The same for any open checkpoint; one block at a time is in memory, or the embedding's share of a rank."""
    config = source.config
    check_ranks(config, model_parallel)
    with (
        atomic_folder(folder, overwrite=overwrite) as beside,
        progress_bar(f"writing {Path(folder).name}", source.tensors.values()) as advance,
    ):
        step = beside / STEP
        step.mkdir()
        write_shards(step, shards(source, model_parallel), model_parallel, advance)
        for rank in range(model_parallel):
            write_pt(step / f"mp_rank_{rank:02}_model_states.pt", rank_state(model_parallel))
        (beside / "configs").mkdir()
        settings = settings_of(config, model_parallel, DIVISIBLE_BY)
        (beside / "configs" / "model.yml").write_text(yaml_text(settings), encoding="utf-8")
        vocabulary = json.dumps({"n_vocab": config.n_vocab}) + "\n"
        (beside / "configs" / VOCABULARY_FILE).write_text(vocabulary, encoding="utf-8")
        (beside / "latest").write_text(STEP, encoding="utf-8")


def shards(source: Source, ranks: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every file's name and its tensors."""
    for layer, prefix, names in parts(source.config):
        tensors = [source.tensors[prefix + name.twin] for name in names]
        if names[0].merge == VOCABULARY:
            multiple = DIVISIBLE_BY * ranks
            tensors = [Cut(tensors[0], 0, 0, -(-source.config.n_vocab // multiple) * multiple)]
        shares = [
            split(name, tensor, ranks, source.config.parallel_residual)
            for name, tensor in zip(names, tensors, strict=True)
        ]
        for rank in range(ranks):
            yield (
                layer_file(layer, rank),
                {name.disk[0]: share[rank] for name, share in zip(names, shares, strict=True)},
            )


def write_shards(step: Path, files: Iterable[tuple[str, dict[str, Any]]], ranks: int, advance: Progress) -> None:
    """Writes files two at a time; the next one's tensors are merged, and the last ones flushed, meanwhile.

    In memory are at most three files, and two layers, a file being a rank's share of one.
    """
    writing = 2 if ranks > 1 else 1
    with concurrent.futures.ThreadPoolExecutor(writing) as writers, concurrent.futures.ThreadPoolExecutor(1) as disk:

        def write(file: Path, arrays: dict[str, Any]) -> concurrent.futures.Future[None]:
            write_pt(file, arrays)
            arrays.clear()  # the future of this call keeps its arguments
            return disk.submit(flush, file)

        written: list[concurrent.futures.Future[concurrent.futures.Future[None]]] = []
        for name, tensors in files:
            if len(written) >= writing:
                written[-writing].result()
            arrays = {key: read(tensor) for key, tensor in tensors.items()}
            advance(sum(array.nbytes for array in arrays.values()))
            written.append(writers.submit(write, step / name, arrays))
        for file in written:
            file.result().result()


def check_ranks(config: NeoXConfig, ranks: int) -> None:
    if not isinstance(ranks, int) or ranks < 1:
        raise ValueError(f"model_parallel={ranks!r} must be a whole number of at least 1")
    for name, size in (("n_heads", config.n_heads), ("n_ff", config.d_ff)):
        if size % ranks:
            raise ValueError(f"{name}={size} is not divisible by model_parallel={ranks}")


def parts(config: NeoXConfig) -> list[tuple[int, str, tuple[Name, ...]]]:
    """Layer number on disk, what the twin's names begin with, and the names."""
    blocks = [(i + 2, f"layers.{i}.", BLOCK) for i in range(config.n_layers)]
    end = config.n_layers + 3
    readout = [] if config.tied else [(end + 1, "", READOUT)]
    return [(0, "", EMBEDDING), *blocks, (end, "", FINAL_NORM), *readout]


def write_pt(file: Path, content: dict[str, Any]) -> None:
    """`torch.save`; raises OSError that names the file where the disk is full."""
    require("torch", "torch")
    import torch

    tensors = {key: as_tensor(v) if isinstance(v, np.ndarray) else v for key, v in content.items()}
    with contextlib.suppress(RuntimeError):  # which would not say what went wrong
        torch.save(tensors, file)  # by name: into a file of Python's it would write with the interpreter's lock held
        return
    try:
        with file.open("wb") as out:
            torch.save(tensors, out)
    except (OSError, RuntimeError) as error:
        first: BaseException = error
        while first.__context__ is not None:  # torch's writer, closing after the disk was full, fails once more
            first = first.__context__
        raise OSError(f"{file} could not be written: {first}") from error


def rank_state(ranks: int) -> dict[str, Any]:
    """What DeepSpeed wants in each rank's own file when the weights lie in layer files."""
    counters = {"global_steps": 0, "global_samples": 0, "skipped_steps": 0, "iteration": 0}
    return {"module": {}, "optimizer": {}, "dp_world_size": 1, "mp_world_size": ranks} | counters
