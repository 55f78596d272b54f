"""A model and an experiment in a project of one's own: trained, saved, resumed, sampled, evaluated, planned."""

import importlib
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from jax.sharding import AbstractMesh

from jaxmodels.io.steps import steps
from jaxmodels.sharding import AXES
from jaxmodels.training import metrics
from jaxmodels.training.commands import sample
from jaxmodels.training.runs.folder import read_about, saved_experiment
from jaxmodels.training.script import main
from tests.train_common import EIGHT_DEVICES, ROOT, TEXT, start

MODEL = '''
"""An MLP language model, which predicts a token from the embeddings of the last few (Bengio et al. 2003)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxmodels
from jaxmodels.cache import Cache, make_cache


@jaxmodels.register("my_project.MLP")
class MLP(nnx.Module):
    """Axes: B batch, S sequence, C context, D width, V vocabulary."""

    sequence_axis = 1
    sharding_rules = (
        (r"embed\\.embedding", P(None, "fsdp")),
        (r"hidden\\.kernel", P("fsdp", "tensor")),
        (r"hidden\\.bias", P("tensor")),
        (r"out\\.kernel", P("tensor", None)),
        (r"out\\.bias", P()),
    )

    def __init__(self, n_vocab: int, width: int, hidden: int, context: int, *, rngs: nnx.Rngs):
        self.sizes = (n_vocab, width, hidden, context)
        self.embed = nnx.Embed(n_vocab, width, rngs=rngs)
        self.hidden = nnx.Linear(context * width, hidden, rngs=rngs)
        self.out = nnx.Linear(hidden, n_vocab, rngs=rngs)

    def config(self):
        return dict(zip(("n_vocab", "width", "hidden", "context"), self.sizes, strict=True))

    def __call__(self, ids):
        x = self.embed(ids)  # [B, S, D]
        return self.logits(x, jnp.arange(ids.shape[1]))

    def logits(self, x, positions):
        places = positions[:, None] - jnp.arange(self.sizes[3])  # [S, C]
        seen = jnp.where((places >= 0)[..., None], x[:, jnp.maximum(places, 0)], 0)  # [B, S, C, D]
        return self.out(jnp.tanh(self.hidden(seen.reshape(*seen.shape[:2], -1))))

    def init_cache(self, batch, max_len, dtype=None, start=None) -> Cache:
        x = jnp.zeros((batch, 1, max_len, self.sizes[1]), dtype or self.embed.embedding.dtype)
        return make_cache([{"x": x}], batch, start)

    def prefill(self, ids, cache):
        logits, cache = self.decode(ids, cache)
        return logits[:, -1], cache

    def decode(self, ids, cache):
        n = ids.shape[1]
        new = self.embed(ids)[:, None]  # [B, 1, S, D]
        x = jax.lax.dynamic_update_slice(cache.layers[0]["x"], new, (0, 0, cache.length, 0))
        return self.logits(x[:, 0], cache.positions(n)), cache.advance(({"x": x},), n)
'''
EXPERIMENT = '''
"""An MLP language model trained on a text."""

import dataclasses

from flax import nnx

from jaxmodels.training import config, experiment
from jaxmodels.training.script import run_script
from my_project.model import MLP


@dataclasses.dataclass(frozen=True)
class Config(config.Config):
    """Hyperparameters of an MLP."""

    PRESETS = ("tiny", "large")

    context: int = 3
    """number of tokens that predict the next"""
    width: int = 4
    """features per token"""
    hidden: int = 16
    """hidden features"""

    def positive(self) -> list[str]:
        return [*super().positive(), "context", "width", "hidden"]

    @classmethod
    def tiny(cls) -> "Config":
        """Seconds on one CPU core."""
        return cls(seq_len=11, batch_size=8, schedule="constant", learning_rate=0.01, every=3, steps=6)

    @classmethod
    def large(cls) -> "Config":
        """Hours on an accelerator."""
        return dataclasses.replace(cls.tiny(), hidden=4096)


class MLPExperiment(experiment.Experiment[Config]):
    config_class = Config

    def model(self, n_vocab: int) -> MLP:
        c = self.config
        return MLP(n_vocab, c.width, c.hidden, c.context, rngs=nnx.Rngs(c.seed))


EXPERIMENT = MLPExperiment

if __name__ == "__main__":
    run_script(EXPERIMENT, "python -m my_project.experiment")
'''
MESH = "data=2,fsdp=2,tensor=2"
NAMED = ["--experiment", "my_project.experiment"]


@pytest.fixture(scope="module")
def project(tmp_path_factory, compile_cache) -> Path:
    """A folder outside the repository with the package my_project and a text."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "my_project").mkdir()
    (folder / "my_project" / "__init__.py").touch()
    (folder / "my_project" / "model.py").write_text(MODEL)
    (folder / "my_project" / "experiment.py").write_text(EXPERIMENT)
    (folder / "sea.txt").write_text(TEXT)
    return folder


def begin(project: Path, module: str, *flags: object, **environment: str) -> subprocess.Popen:
    return start(module, *flags, cwd=project, PYTHONPATH=str(ROOT), **environment)


def end(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return out, err


TRAIN = ["--text", "sea.txt", "--no-tensorboard"]


@pytest.fixture(scope="module")
def runs(project) -> tuple[Path, str]:
    """Folder with the runs one, of one device, and eight, of eight host devices; and what the first printed."""
    one = begin(project, "my_project.experiment", *TRAIN, "--out", "runs/one")
    eight = begin(project, "my_project.experiment", *TRAIN, "--out", "runs/eight", "--mesh", MESH, **EIGHT_DEVICES)
    out, _ = end(one)
    end(eight)
    return project / "runs", out


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics.read(run) if "loss" in line]


@pytest.mark.slow
def test_it_trains_alike_on_one_device_and_on_eight(runs):
    folder, out = runs
    assert re.search(
        r"^step 3: loss \d\.\d+ \(mean of 3 steps\), validation loss \d\.\d+, written greedily:\n    .*\|", out, re.M
    )
    assert len(losses(folder / "one")) == 6
    np.testing.assert_allclose(losses(folder / "eight"), losses(folder / "one"), rtol=1e-5)
    about = read_about(folder / "one")
    assert (about.script, about.standalone) == ("my_project.experiment", True)
    saved = folder / "one" / "checkpoints" / "6" / "model" / "config.json"
    assert json.loads(saved.read_text())["model"] == "my_project.MLP"


@pytest.mark.slow
def test_it_resumes_on_other_devices(runs, project):
    run = Path(shutil.copytree(runs[0] / "one", runs[0] / "resumed"))
    flags = ["--resume", run, "--steps", 8, "--mesh", MESH, "--no-tensorboard"]
    out, _ = end(begin(project, "my_project.experiment", *flags, **EIGHT_DEVICES))
    assert "at step 6\n" in out
    assert steps(run / "checkpoints")[-1] == 8
    assert len(losses(run)) == 8


@pytest.mark.slow
def test_commands_read_its_runs_if_its_module_is_named(runs, project):
    sampled = begin(project, "train.sample", "runs/one", *NAMED, "--prompt", "7 men", "--length", 20)
    evaluated = begin(project, "train.evaluate", "runs/one", *NAMED)
    assert re.fullmatch(r"7 men.{20}\n", end(sampled)[0], re.S)
    loss = re.search(r"loss +([\d.]+) nats per character", end(evaluated)[0])[1]
    assert float(loss) == pytest.approx(metrics.read(runs[0] / "one")[-1]["validation_loss"], abs=1e-4)


@pytest.mark.slow
def test_no_module_is_imported_only_because_a_file_names_it(runs, project):
    _, err = end(begin(project, "train.sample", "runs/one"), 2)
    assert re.fullmatch(r".*my_project\.MLP.*--experiment my_project\.experiment\n", err)
    other = Path(shutil.copytree(runs[0] / "one", runs[0] / "other"))
    about = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**about, "standalone": False}))
    with pytest.raises(ValueError, match=r"my_project\.experiment.*--experiment my_project\.experiment"):
        saved_experiment(other)


@pytest.fixture
def own(project, monkeypatch) -> ModuleType:
    """The experiment's module, and the project as the current folder."""
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(project)
    return importlib.import_module("my_project.experiment")


def train(kind: type, *flags: object) -> int:
    return main(kind, "python -m my_project.experiment", [*map(str, [*TRAIN, *flags])])


def test_its_presets_are_in_its_help(own, capsys):
    with pytest.raises(SystemExit):
        train(own.MLPExperiment, "--help")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--preset {tiny,large}" in shown
    assert "tiny: Seconds on one CPU core" in shown
    assert "large: Hours on an accelerator" in shown
    assert "--context INT" in shown


def lacking(own: ModuleType, **attributes: object) -> type:
    """An experiment with a model class that differs in some attributes; those that are None are missing."""
    from my_project.model import MLP

    members = {name: value for name, value in vars(MLP).items() if name not in ("__dict__", "__weakref__")}
    members = {name: value for name, value in (members | attributes).items() if value is not None}
    model = type("Lacking", MLP.__bases__, members)
    return type("Experiment", (own.MLPExperiment,), {"model": lambda self, n: model(n, 4, 16, 3, rngs=own.nnx.Rngs(0))})


@pytest.fixture
def registered(monkeypatch):
    """Registers a class whatever its name."""
    from jaxmodels import models

    monkeypatch.setattr(models, "name_of", lambda model: "my_project.MLP")
    monkeypatch.setattr("jaxmodels.training.experiment.name_of", lambda model: "my_project.MLP")


def test_a_model_that_is_not_registered_is_refused_first(own, tmp_path):
    with pytest.raises(ValueError, match=r"Lacking, .*@jaxmodels\.register"):
        train(lacking(own), "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"sequence_axis": None}, "Lacking has sequence_axis=None.* 0 .* 1 "),
        ({"config": lambda self: {"n_vocab": {1}}}, r"my_project\.MLP\.config\(\).*JSON"),
        ({"config": lambda self: {"n_vocab": 5, "width": 2, "hidden": 3, "context": 1}}, "embed.embedding"),
        ({"config": lambda self: {}}, "my_project.MLP"),
    ],
)
def test_a_model_that_lacks_what_a_run_needs_is_refused_first(attributes, message, own, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(lacking(own, **attributes), "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_without_sharding_rules_is_refused_on_a_mesh_that_needs_them(own):
    mesh = AbstractMesh((1, 2, 1), AXES)
    experiment = lacking(own, sharding_rules=None)(own.Config.tiny())
    with pytest.raises(ValueError, match=r"Lacking .*sharding_rules.*fsdp=2"):
        experiment.program(23, mesh)


@pytest.mark.slow
@pytest.mark.usefixtures("registered")
def test_a_model_that_cannot_decode_trains_without_samples(own, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    assert train(lacking(own, init_cache=None, decode=None), "--out", run, "--steps", 3) == 0
    out = capsys.readouterr().out
    assert "no sample: Lacking has no init_cache, decode\n" in out
    assert re.search(r"^step 3: loss \d\.\d+ \(mean of 3 steps\), validation loss \d\.\d+$", out, re.M)
    from my_project.model import MLP

    monkeypatch.delattr(MLP, "init_cache")
    with pytest.raises(ValueError, match=r"MLP .*init_cache"):
        sample.sample(sample.parser().parse_args([str(run)]))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu (extra plan)")
def test_it_is_planned_for_a_tpu(project):
    flags = ["my_project.experiment", "--topology", "v5e:2x4", "--mesh", MESH]
    out, _ = end(begin(project, "train.plan", *flags))
    assert "my_project.experiment, preset tiny: " in out
    assert out.rstrip().endswith("fits")


@pytest.mark.slow
def test_planning_finds_it_and_refuses_an_unknown_topology(project):
    _, err = end(begin(project, "train.plan", "my_project.experiment", "--topology", "v9:1"), 2)
    assert re.fullmatch(r"python -m train.plan: topology='v9:1' .*\n", err)
