"""Check one pair of the zoo, and store its result."""

import contextlib
import io
import json
import math
import re
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import parity
from examples.zoo.registry import PAIRS, Pair
from jaxmodels.convert import ConversionError
from jaxmodels.io.atomic import atomic_file
from parity.compare.suggest import Suggestion
from parity.report.report import Report

STEPS = 2  # of training
Progress = Callable[[str], None]


def prepare() -> Any:
    """Import transformers, with what its Flax models need of an older JAX.

    Raises ValueError for a version without Flax models.
    """
    clip = jnp.clip

    def clipped(x: Any, min: Any = None, max: Any = None, *, a_min: Any = None, a_max: Any = None) -> jax.Array:
        return clip(x, min if a_min is None else a_min, max if a_max is None else a_max)

    jnp.clip = clipped  # the port uses names of arguments that JAX 0.10 has no more
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import transformers

    if not hasattr(transformers, "FlaxBertModel"):
        raise ValueError(f"transformers=={transformers.__version__} has no Flax models; make zoo installs 4.57.6")
    transformers.utils.logging.set_verbosity_error()
    return transformers


def built(library: Any, pair: Pair) -> tuple[Any, Any]:
    """A pair's PyTorch module, and the Linen module inside the Flax model."""
    config = pair.config(library)
    torch.manual_seed(0)
    theirs = getattr(library, pair.model)(config).eval()
    with contextlib.redirect_stdout(io.StringIO()):
        ours = getattr(library, f"Flax{pair.model}")(config, seed=0)
    return theirs, ours.module


def checked(library: Any, name: str, progress: Progress) -> dict[str, Any]:
    """The result of a pair, with values that JSON can hold."""
    pair = PAIRS[name]
    began = time.perf_counter()
    names = "as they are"
    try:
        theirs, ours = built(library, pair)
        settings: dict[str, Any] = {
            "channels_last": pair.channels_last,
            "torch_kwargs": pair.torch_kwargs,
            "flax_kwargs": pair.flax_kwargs,
        }
        inputs = pair.inputs(np.random.default_rng(0))
        try:
            report = parity.check(theirs, ours, inputs, steps=STEPS, name=name, progress=progress, **settings)
        except ConversionError:
            progress("suggest")
            suggestion = parity.suggest(theirs, ours, inputs, verify=True, **settings)
            names = described(suggestion)
            report = parity.check(
                theirs, ours, inputs, names=suggestion.names, steps=STEPS, name=name, progress=progress, **settings
            )
        found = result_of(report)
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        found = {"verdict": "error", "noise": None, "remark": f"{type(error).__name__}: {line}", "narrow": []}
        found["report"] = traceback.format_exc()
    jax.clear_caches()
    return found | {"names": names, "seconds": time.perf_counter() - began, "steps": STEPS, "software": software()}


def described(suggestion: Suggestion) -> str:
    """The suggested names in a word or two."""
    count = f"{len(suggestion.names)} suggested"
    return count if suggestion.complete else f"{count}, incomplete"


def result_of(report: Report) -> dict[str, Any]:
    """Verdict, largest difference in float64, and what the report says of it."""
    wide = [c.value for c in report.checks if c.precision == "float64" and not math.isnan(c.value)]
    worst = max(wide, default=math.nan)
    remark = "" if report.passed else str(report.divergence or report.error or failed(report))
    return {
        "verdict": {"agrees": "agrees", "DIFFERS": "differs"}.get(report.verdict, "error"),
        "noise": str(worst),
        "remark": remark.splitlines()[0] if remark else "",
        "narrow": narrow(report),
        "report": str(report),
    }


def narrow(report: Report) -> list[str]:
    """The lines that hold a constant or table in float32, if its rounding explains the difference."""
    notes = [note for note in report.notes if note.startswith("float32 inside")]
    return list(dict.fromkeys(place for note in notes for place in re.findall(r"[\w/]+\.py:\d+", note)))


def failed(report: Report) -> str:
    """The first reading that failed."""
    return next((f"{c.kind} ({c.precision}) at {c.worst}" for c in report.checks if not c.passed), "")


def software() -> dict[str, str]:
    """Versions of the libraries."""
    import flax
    import transformers

    libraries = {"jax": jax, "flax": flax, "torch": torch, "transformers": transformers}
    return {name: library.__version__ for name, library in libraries.items()}


def store(folder: Path, name: str, result: Mapping[str, Any]) -> None:
    """Write the result of a pair."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / f"{name}.json", json.dumps(result, indent=1))


def write(file: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(file) as new:
        new.write_text(text)


def stored(folder: Path) -> dict[str, dict[str, Any]]:
    """All results, in the order of the registry."""
    files = {name: folder / f"{name}.json" for name in PAIRS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
