"""A run's folder: its configuration in config.json, and the check that a command may continue it.

RUN/config.json     {"format": 3, "script": "train.rope", "standalone": true, "config": {…}, "sha256": …}
                    if it fine-tunes a checkpoint: "original" and "token_ids", see `jaxmodels.training.original`
RUN/vocabulary.json, RUN/metrics.jsonl, RUN/checkpoints/, RUN/tensorboard/, RUN/profile/, RUN/.lock
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxmodels.io.atomic import atomic_file
from jaxmodels.io.bounded import read_object
from jaxmodels.io.steps import check_run, steps
from jaxmodels.models import names
from jaxmodels.process.texts import quoted
from jaxmodels.text import Vocabulary, load_vocabulary
from jaxmodels.training.checkpoints import LOCK, UnknownModel, latest_model
from jaxmodels.training.config import Config
from jaxmodels.training.experiment import EXPERIMENTS, ConfigT, Experiment, experiment_class, script_of

FORMAT = 3
FILE = "config.json"
ORIGINAL = ("original", "token_ids")  # entries of config.json about the checkpoint that was fine-tuned
# Fields that may differ when a run is resumed; text and index are compared by content. `steps` may change too, except
# with a cosine schedule, which depends on it.
MAY_CHANGE = {"text", "index", "every", "validation_batches", "keep", "keep_every"}


@dataclasses.dataclass(frozen=True)
class About:
    """Content of a run's config.json."""

    script: str  # module of the experiment
    config: dict[str, Any]
    sha256: str  # of the data
    standalone: bool | None  # see `Experiment`; None in folders of older versions
    original: dict[str, Any] = dataclasses.field(default_factory=dict)  # `Original.about` of a run that fine-tunes


def is_run(folder: Path) -> bool:
    """True for a training run's folder, False for e.g. a model's."""
    return (folder / FILE).exists() and (folder / "checkpoints").is_dir()


def read_about(run: Path) -> About:
    """Read a run's config.json; raises ValueError if the folder holds no training run."""
    file = run / FILE
    check_run(run)
    if not file.is_file():
        raise ValueError(f"{run} holds no training run")
    try:
        about = read_object(file)
        if about["format"] != FORMAT:
            raise ValueError(f"{file} has format {quoted(about['format'])}, this version reads {FORMAT}")
        for name, kind in (("config", dict), ("script", str), ("sha256", str)):
            if not isinstance(about[name], kind):
                raise ValueError(f"{file} has {name}={quoted(about[name])}, must be a {kind.__name__}")
        original = {key: about[key] for key in ORIGINAL if key in about}
        return About(about["script"], about["config"], about["sha256"], about.get("standalone"), original)
    except KeyError as error:
        raise ValueError(f"{file} does not describe a training run: it has no {error}") from None


def write_about(run: Path, experiment: Experiment[Any], sha256: str, original: Mapping[str, Any]) -> None:
    """Write config.json: the experiment, its complete configuration, the checksum of its data, and its origin."""
    about = {
        "format": FORMAT,
        "script": script_of(type(experiment)),
        "standalone": experiment.standalone,
        "config": dataclasses.asdict(experiment.config),
        "sha256": sha256,
        **original,
    }
    with atomic_file(run / FILE) as new:
        new.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def saved_config(kind: type[Experiment[ConfigT]], run: Path) -> ConfigT:
    """Read the configuration of a run; raises ValueError if the folder holds no run of this experiment."""
    about, script = read_about(run), script_of(kind)
    if about.script != script:
        raise ValueError(f"{run} is a run of {about.script}, not of {script}")
    config_class: Any = kind.config_class
    try:
        return config_class(**about.config)
    except TypeError as error:
        raise ValueError(f"{run / FILE} has a configuration that {script} does not take: {error}") from None


def saved_experiment(run: Path, named: str | None = None) -> Experiment[Any]:
    """Rebuild the experiment of a run.

    named: name or module path of the experiment, from the user; its module is imported. If omitted, the run's own
    script is imported only if the run needs it and it is one of EXPERIMENTS: a file must not cause any other import.
    Raises ValueError if the script is needed and cannot be imported, or is not the named one.
    """
    about = read_about(run)
    if named is not None:
        kind = experiment_class(named)
        return kind(saved_config(kind, run))
    if about.standalone:
        return Experiment(Config.from_saved(about.config))
    if about.script not in EXPERIMENTS.values():
        raise ValueError(f"{run} needs its script {about.script}: name it with --experiment {about.script}")
    kind = experiment_class(about.script)
    return kind(saved_config(kind, run))


def open_run(run: Path, named: str | None = None, mesh: Mesh | None = None) -> tuple[Experiment[Any], Any, Vocabulary]:
    """Open a run: its experiment, the model of its latest complete checkpoint, on a mesh if given, and its vocabulary.

    Raises ValueError like `saved_experiment`, and if the model is of a class that is not registered.
    """
    experiment = saved_experiment(run, named)
    try:
        model, _ = latest_model(run, mesh)
    except UnknownModel as error:
        raise unknown_model(run, named, error) from None
    return experiment, model, load_vocabulary(run / "vocabulary.json")


def experiment_of(run: Path, named: str | None, model_name: str) -> Experiment[Any]:
    """Experiment of a run with a model of that name; raises ValueError like `open_run`."""
    experiment = saved_experiment(run, named)
    if model_name not in names():
        raise unknown_model(run, named, f"model={model_name!r} is not registered")
    return experiment


def unknown_model(run: Path, named: str | None, error: object) -> ValueError:
    """Error for a model of a class that is not registered, with what to do."""
    script = read_about(run).script
    hint = f": name the module that registers it with --experiment {script}" if named is None else ""
    return ValueError(f"{run}: {error}{hint}")


def check_folder(experiment: Experiment[Any], run: Path) -> None:
    """Raise ValueError if a folder holds something other than a run, or a run with other hyperparameters.

    A run without a checkpoint may start again with any hyperparameters. Raises ValueError too if a file of the run is
    a symbolic link.
    """
    check_run(run)
    if not (run / FILE).exists():
        if run.exists() and (not run.is_dir() or any(not is_leftover(file) for file in run.iterdir())):
            raise ValueError(f"{run} exists and holds no training run: name another folder with --out")
        return
    if not has_begun(run):
        read_about(run)  # raises for the config.json of a model
        return
    saved = saved_config(type(experiment), run)
    may = MAY_CHANGE if saved.schedule == "cosine" else MAY_CHANGE | {"steps"}
    theirs, ours = dataclasses.asdict(saved), dataclasses.asdict(experiment.config)
    changed = [name for name in theirs if name not in may and theirs[name] != ours[name]]
    if changed:
        was, now = (", ".join(f"{name}={values[name]}" for name in changed) for values in (theirs, ours))
        raise ValueError(
            f"{run} was trained with {was}, not {now}: continue it with --resume {run}, or name another folder "
            "with --out"
        )


def has_begun(run: Path) -> bool:
    """True if a run has a checkpoint."""
    return bool(steps(run / "checkpoints"))


def is_leftover(file: Path) -> bool:
    """True for files that a run leaves if it is killed before its config.json is written."""
    return file.name == LOCK or file.name.startswith(f".{FILE}.")
