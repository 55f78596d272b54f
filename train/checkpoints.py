"""A run on disk: everything from which it goes on exactly.

RUN/checkpoint/              replaced as a whole, so it is always complete
    run.json                 {"format": 1, "step": …, "config": {…}, "text_sha256": …}
    model/                   `jaxmodels.load` reads it
    optimizer/               Orbax; one entry per array, named by its path (opt_state.1.mu.generator.projection.bias)
    vocabulary.json          `CharVocabulary.load` reads it
    losses.npy               float64 [step], nats per token
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import optax
from flax import nnx

import jaxmodels
from jaxmodels.checkpoint import load_arrays, save_arrays, written_beside
from jaxmodels.text import CharVocabulary
from train.loop import State

FORMAT = 1


def save(run: Path, state: State, vocabulary: CharVocabulary, config: dict[str, Any], text_sha256: str) -> None:
    """Writes a run's checkpoint, all of it or nothing; one that is there is replaced."""
    about = {"format": FORMAT, "step": state.step, "config": config, "text_sha256": text_sha256}
    with written_beside(run / "checkpoint", overwrite=True) as folder:
        jaxmodels.save(state.model, folder / "model")
        save_arrays(folder / "optimizer", state.optimizer)
        vocabulary.save(folder / "vocabulary.json")
        np.save(folder / "losses.npy", np.asarray(state.losses, np.float64))
        (folder / "run.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def read_about(run: Path) -> dict[str, Any]:
    """What run.json says; raises ValueError where the folder holds no checkpoint of a run."""
    file = run / "checkpoint" / "run.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ValueError(f"{file} has format {about['format']}, this version reads {FORMAT}")
        return {name: about[name] for name in ("step", "config", "text_sha256")}
    except FileNotFoundError:
        raise ValueError(f"{run} holds no checkpoint of a training run") from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not describe a training run: {error!r}") from None


def load_model(run: Path) -> tuple[Any, CharVocabulary]:
    """The model and its vocabulary; raises ValueError where the folder holds no complete checkpoint."""
    read_about(run)
    vocabulary = CharVocabulary.load(run / "checkpoint" / "vocabulary.json")
    return jaxmodels.load(run / "checkpoint" / "model"), vocabulary


def load(run: Path, transformation: optax.GradientTransformation) -> State:
    """The state that `save` wrote; raises ValueError where it is not complete, or is another optimizer's."""
    model, _ = load_model(run)
    folder = run / "checkpoint"
    optimizer = load_arrays(folder / "optimizer", nnx.Optimizer(model, transformation, wrt=nnx.Param))
    try:
        losses = np.load(folder / "losses.npy").tolist()
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{folder / 'losses.npy'} does not hold the losses of its run: {error}") from error
    return State(model, optimizer, losses)
