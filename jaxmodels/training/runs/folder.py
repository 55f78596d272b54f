"""A run's folder: its configuration in config.json, and the check that a command may continue it.

RUN/config.json     {"format": 3, "script": "train.rope", "standalone": true, "config": {…}, "sha256": …}
                    if it fine-tunes a checkpoint: "original" and "token_ids", see `jaxmodels.training.runs.original`
                    if it was branched: "branches": [{"run": …, "step": …, "changed": {name: [before, after]}}, …]
                    if its user named all of it: "signature", see `jaxmodels.training.runs.unnamed`
RUN/vocabulary.json, RUN/metrics.jsonl, RUN/checkpoints/, RUN/tensorboard/, RUN/profile/, RUN/.lock
"""

import dataclasses
import json
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from jax.sharding import Mesh

from jaxmodels.convert.companions import Companions
from jaxmodels.io.atomic import atomic_file
from jaxmodels.io.bounded import check_format, errors_naming, read_object
from jaxmodels.io.checkpoint import checked_place
from jaxmodels.io.steps import check_run, latest_step, problem, read_mark, steps
from jaxmodels.models import names
from jaxmodels.process.paths import check_utf8, local
from jaxmodels.process.texts import quoted, shortened
from jaxmodels.text import Vocabulary, load_vocabulary
from jaxmodels.training import metrics
from jaxmodels.training.checkpoints import LOCK, Checkpoints, Position, UnknownModel, latest_model
from jaxmodels.training.config import Config
from jaxmodels.training.experiment import EXPERIMENTS, ConfigT, Experiment, check_checkout, experiment_class, script_of
from jaxmodels.training.runs.agreement import FILE, Expected, check_model
from jaxmodels.training.runs.unnamed import signed

FORMAT = 3
ORIGINAL = ("original", "token_ids")  # entries of config.json about the checkpoint that was fine-tuned
# Fields that may differ when a run is resumed; text and index are compared by content. `steps` may change too, except
# with a cosine schedule, which depends on it.
MAY_CHANGE = {"text", "index", "every", "validation_batches", "keep", "keep_every", "attention_kernel"}


@dataclasses.dataclass(frozen=True)
class About:
    """Content of a run's config.json."""

    script: str  # module of the experiment
    config: dict[str, Any]
    sha256: str  # of the data
    standalone: bool | None  # see `Experiment`; None in folders of older versions
    original: dict[str, Any] = dataclasses.field(default_factory=dict)  # `Original.about` of a run that fine-tunes
    branches: list[dict[str, Any]] = dataclasses.field(
        default_factory=list
    )  # checkpoints it was branched from, in order

    @property
    def kept(self) -> dict[str, Any]:
        """Entries of config.json that a resumed run keeps."""
        return {**self.original, **({"branches": self.branches} if self.branches else {})}


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
        check_format(file, about["format"], FORMAT)
        for name, kind in (("config", dict), ("script", str), ("sha256", str)):
            if not isinstance(about[name], kind):
                raise ValueError(f"{file} has {name}={quoted(about[name])}, must be a {kind.__name__}")
        if not isinstance(about.get("standalone"), bool | None):
            raise ValueError(f"{file} has standalone={quoted(about['standalone'])}, must be true or false")
        for name in ORIGINAL:
            if not isinstance(about.get(name, {}), dict):
                raise ValueError(f"{file} has {name}={quoted(about[name])}, must be an object")
        original = {key: about[key] for key in ORIGINAL if key in about}
        branches = about.get("branches", [])
        if not isinstance(branches, list) or not all(map(is_branch, branches)):
            raise ValueError(f"{file} has branches={quoted(branches)}, must be a list of objects with run and step")
        return About(about["script"], about["config"], about["sha256"], about.get("standalone"), original, branches)
    except KeyError as error:
        raise ValueError(f"{file} does not describe a training run: it has no {error}") from None


def is_branch(entry: Any) -> bool:
    """True for an entry of `branches` in config.json."""
    named = isinstance(entry, dict) and isinstance(entry.get("run"), str) and isinstance(entry.get("changed"), dict)
    return named and type(entry.get("step")) is int


def write_about(
    run: Path, experiment: Experiment[Any], sha256: str, original: Mapping[str, Any], *, sign: bool = False
) -> None:
    """Write config.json: the experiment, its complete configuration, the checksum of its data, and its origin.

    original: further entries, of `Original.about` and `Branch.about`. sign: add a signature.
    """
    about = {
        "format": FORMAT,
        "script": script_of(type(experiment)),
        "standalone": experiment.standalone,
        "config": dataclasses.asdict(experiment.config),
        "sha256": sha256,
        **original,
    }
    with atomic_file(run / FILE) as new:
        new.write_text(json.dumps(signed(about) if sign else about, indent=2) + "\n", encoding="utf-8")


def saved_config(kind: type[Experiment[ConfigT]], run: Path) -> ConfigT:
    """Read the configuration of a run; raises ValueError if the folder holds no run of this experiment."""
    about, script = read_about(run), script_of(kind)
    if about.script != script:
        raise ValueError(f"{run} is a run of {about.script}, not of {script}")
    config_class: Any = kind.config_class
    try:
        with errors_naming(run / FILE):
            config_class.check_types(about.config)
            config = config_class(**about.config)
    except TypeError as error:
        raise ValueError(
            f"{run / FILE} has a configuration that {script} does not take: {shortened(str(error))}"
        ) from None
    for step in reversed(steps(run / "checkpoints")):
        folder = run / "checkpoints" / str(step)
        if problem(folder) is None:  # others are skipped when the run is restored
            Expected(settled(config)).check_hyperparameters(folder, read_mark(folder))
            break
    return config


def settled(config: Config) -> dict[str, Any]:
    """Hyperparameters that no resumed run may change, as JSON values."""
    may = MAY_CHANGE if config.schedule == "cosine" else MAY_CHANGE | {"steps"}
    return {name: value for name, value in as_json(config).items() if name not in may}


def as_json(config: Config) -> dict[str, Any]:
    """Fields as JSON values, as a run's files have them: a tuple is a list."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def expected(run: Path, experiment: Experiment[Any]) -> Expected:
    """Content that the checkpoints of a run must have; experiment: with the run's configuration."""
    branches = read_about(run).branches if (run / FILE).exists() else []
    began = branches[-1]["step"] if branches else 0
    return Expected(settled(experiment.config), began, type(experiment).transformation is Experiment.transformation)


def saved_experiment(run: Path, named: str | None = None) -> Experiment[Any]:
    """Rebuild the experiment of a run.

    named: name or module path of the experiment, from the user; its module is imported. If omitted, the run's own
    script is imported only if it is one of EXPERIMENTS: a file must not cause any other import. Raises ValueError if
    the script is needed and cannot be imported, or is not the named one, or if config.json says that it is not needed.
    """
    about, own = read_about(run), project_experiment(run)
    if own is not None and about.standalone and not own.standalone:
        raise ValueError(f"{run / FILE} has standalone=true, must be false: runs of {about.script} need their script")
    if named is None and about.standalone:
        with errors_naming(run / FILE):
            return for_run(Experiment(Config.from_saved(about.config)), run)
    if named is None and about.script not in EXPERIMENTS.values():
        raise ValueError(f"{run} needs its script {about.script}: name it with --experiment {about.script}")
    kind = experiment_class(about.script if named is None else named)
    return for_run(kind(saved_config(kind, run)), run)


def project_experiment(run: Path) -> Experiment[Any] | None:
    """Experiment of a run, if its script is one of the project's and this is a checkout; otherwise None."""
    script = read_about(run).script
    try:
        if script not in EXPERIMENTS.values():
            return None
        check_checkout(script)
    except ValueError:
        return None
    kind = experiment_class(script)
    return for_run(kind(saved_config(kind, run)), run)


def for_run(experiment: Experiment[Any], run: Path) -> Experiment[Any]:
    """Prepare an experiment with a run's configuration, of which nothing was named by the user."""
    experiment.unnamed = frozenset(field.name for field in dataclasses.fields(experiment.config))
    if has_begun(run):
        experiment.resume(run)  # its own checkpoint, not the one that it was fine-tuned from
    return experiment


def check_own_model(run: Path) -> None:
    """Raise ValueError like `check_model` for a run of the project's own scripts, in a checkout."""
    own = project_experiment(run)
    if own is not None and has_begun(run):
        check_model(own, run, len(load_vocabulary(run / "vocabulary.json")))


def open_run(run: Path, named: str | None = None, mesh: Mesh | None = None) -> tuple[Experiment[Any], Any, Vocabulary]:
    """Open a run: its experiment, the model of its latest complete checkpoint, on a mesh if given, and its vocabulary.

    Raises ValueError like `saved_experiment`, if the model is of a class that is not registered, and if the run's
    configuration builds another one.
    """
    experiment = saved_experiment(run, named)
    check_own_model(run)
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
    check_own_model(run)
    return experiment


def check_reads_tokens_alone(run: Path, named: str | None, model_name: str) -> None:
    """Raise ValueError like `experiment_of`, and for a run whose model reads something besides the tokens."""
    if not experiment_of(run, named, model_name).reads_tokens_alone:
        raise ValueError(f"{run} was trained on more than tokens: it is evaluated by `jaxmodels evaluate` on one text")


def unknown_model(run: Path, named: str | None, error: object) -> ValueError:
    """Error for a model of a class that is not registered, with what to do."""
    script = read_about(run).script
    hint = f": name the module that registers it with --experiment {script}" if named is None else ""
    return ValueError(f"{run}: {error}{hint}")


def check_folder(experiment: Experiment[Any], run: Path, branch: "Branch | None" = None) -> None:
    """Raise ValueError if a folder holds something other than a run, or a run with other hyperparameters.

    A run without a checkpoint may start again with any hyperparameters. branch: what a new run begins with; a run that
    has begun must have been branched from it. Raises ValueError too if a file of the run is a symbolic link, and for a
    path that `checked_place` refuses.
    """
    checked_place(run, "folder", written=True)
    check_run(run)
    if branch is not None:
        branch.check(experiment)
        if run.absolute() == branch.run:
            raise ValueError(f"{run} cannot be branched into itself: name another folder with --out")
    if not (run / FILE).exists():
        if run.exists() and (not run.is_dir() or any(not is_leftover(file) for file in run.iterdir())):
            raise ValueError(f"{run} exists and holds no training run: name another folder with --out")
        return
    if not has_begun(run):
        read_about(run)  # raises for the config.json of a model
        return
    if branch is not None and not branch.is_origin(run):
        raise ValueError(
            f"{run} was not branched from {branch.run} at step {branch.step}: name another folder with --out"
        )
    saved, config = saved_config(type(experiment), run), experiment.config
    changed = {name: values for name, values in differing(saved, config).items() if name in settled(saved)}
    if changed:
        was, now = (", ".join(f"{name}={values[i]}" for name, values in changed.items()) for i in (0, 1))
        fixed = " (a cosine schedule ends at its last step)" if "steps" in changed else ""
        typed = shlex.quote(str(run))
        raise ValueError(
            f"{run} was trained with {was}, not {now}{fixed}: continue it unchanged with --resume {typed}, name "
            f"another folder with --out, or continue with these from a step on, in a new run, with --branch {typed}"
        )
    taken = steps(run / "checkpoints")[-1]
    if config.steps < taken:
        raise ValueError(f"steps={config.steps} is less than the {taken} steps that {run} has taken")


def differing(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """Fields of two configurations of one class that differ, with both values."""
    ours, theirs = as_json(before), as_json(after)
    return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}


@dataclasses.dataclass(frozen=True)
class Branch:
    """Checkpoint of a run that a new run, with other hyperparameters, begins with.

    run: absolute folder of the run.
    """

    run: Path
    step: int

    @classmethod
    def at(cls, run: Path | str, step: int | None = None) -> Self:
        """The checkpoint of a step, default the latest complete one; raises ValueError if the run has none."""
        run = local(run, "branch").absolute()
        check_utf8(run, "branch")
        read_about(run)
        if step is None:
            step = int(latest_step(run)[0].name)
        found = steps(run / "checkpoints")
        if step not in found:
            have = ", ".join(map(str, found)) or "none"
            raise ValueError(f"from_step={step}: {run} has no checkpoint of it; it has {have}")
        return cls(run, step)

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Self:
        """The checkpoint that an entry of `branches` in config.json names; raises ValueError if it is gone."""
        return cls.at(Path(entry["run"]), entry["step"])

    def check(self, experiment: Experiment[Any]) -> None:
        """Raise ValueError if the checkpoint is damaged or of another script, or if no steps are left to take."""
        saved_config(type(experiment), self.run)
        if wrong := problem(self.folder):
            raise ValueError(f"from_step={self.step}: {wrong}")
        if experiment.config.steps <= self.step:
            raise ValueError(f"steps={experiment.config.steps} must be above from_step={self.step}")

    @property
    def folder(self) -> Path:
        return self.run / "checkpoints" / str(self.step)

    def is_origin(self, run: Path) -> bool:
        """True if a run was branched from this checkpoint."""
        branches = read_about(run).branches
        return bool(branches) and (Path(branches[-1]["run"]), branches[-1]["step"]) == (self.run, self.step)

    def source(self, experiment: Experiment[Any]) -> Experiment[Any]:
        """Experiment of the run that is branched, of the class of the new run's."""
        return for_run(type(experiment)(saved_config(type(experiment), self.run)), self.run)

    def changed(self, experiment: Experiment[Any]) -> dict[str, tuple[Any, Any]]:
        """Hyperparameters that the new run changes: name -> (before, after)."""
        return differing(saved_config(type(experiment), self.run), experiment.config)

    def about(self, experiment: Experiment[Any]) -> dict[str, Any]:
        """Entries of the new run's config.json about its origin."""
        source = read_about(self.run)
        own = {"run": str(self.run), "step": self.step, "changed": self.changed(experiment)}
        return {**source.original, "branches": [*source.branches, own]}

    def sentence(self, experiment: Experiment[Any]) -> str:
        """Lines that a new run prints about its origin."""
        changed = self.changed(experiment).items()
        what = ", ".join(f"{name}={after} (before: {before})" for name, (before, after) in changed)
        return f"branched from {self.run} at step {self.step}: {what or 'nothing changed'}"

    def position(
        self, checkpoints: Checkpoints, experiment: Experiment[Any], sha256: str, start: dict[str, Any]
    ) -> Position:
        """Read the checkpoint as the position that the new run begins at.

        The order of examples goes on after those that were used, unless the data, its order or its sequences differ:
        then it starts anew. sha256: of the new run's data. start: state of its batches at the start. Raises ValueError
        if the arrays do not fit the new configuration, or if the metrics are not what a run writes.
        """
        for _ in metrics.each(self.run) if (self.run / metrics.FILE).exists() else ():
            pass
        before, after = saved_config(type(experiment), self.run), experiment.config
        content = expected(self.run, self.source(experiment))
        later = (before.clip is not None) - (after.clip is not None) if content.counted else 0
        try:
            position = checkpoints.read(self.folder, content, later)
        except ValueError as error:
            names = ", ".join(self.changed(experiment)) or "nothing"
            raise ValueError(f"{self.run} at step {self.step} does not fit, with {names} changed: {error}") from None
        if names := checkpoints.not_finite(position.state):
            raise ValueError(f"{self.run} at step {self.step} has values that are not finite: {names}")
        same = sha256 == read_about(self.run).sha256
        cut = ("seq_len", "within_documents", "seed")
        if same and all(getattr(before, name) == getattr(after, name) for name in cut):
            used = position.data["next_index"] * before.batch_size
            start = {**start, "next_index": -(-used // after.batch_size)}
        return Position(position.state, start, position.losses)

    def companions(self) -> Companions:
        """Files that belong to the checkpoint that the run fine-tunes; none if it was trained from scratch."""
        return Companions.of(self.run) if read_about(self.run).original else Companions()

    def copy_metrics(self, run: Path) -> None:
        """Copy the metrics to the new run, in place of those of a first attempt that was killed.

        Its config.json is there before: a run that is killed here has no checkpoint, and begins again with the branch.
        """
        if not (self.run / metrics.FILE).exists():
            (run / metrics.FILE).unlink(missing_ok=True)
            return
        with atomic_file(run / metrics.FILE) as new:
            shutil.copyfile(self.run / metrics.FILE, new)


def has_begun(run: Path) -> bool:
    """True if a run has a checkpoint."""
    return bool(steps(run / "checkpoints"))


def is_leftover(file: Path) -> bool:
    """True for files that a run leaves if it is killed before its config.json is written."""
    return file.name == LOCK or file.name.startswith(f".{FILE}.")
