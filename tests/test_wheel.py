"""The built wheel, installed into a fresh environment and used from a folder that is not a checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUBCOMMANDS = (
    "convert",
    "inspect",
    "verify",
    "quantize",
    "generate",
    "neighbors",
    "evaluate",
    "lm-eval",
    "sample",
    "tokenize",
    "new",
    "plot",
    "clean",
    "plan",
)
# Packages of the extras. optax, orbax, rich and yaml are not among them: flax itself depends on those.
OPTIONAL = (
    *("torch", "faiss", "sklearn", "tokenizers", "safetensors", "transformers", "filelock", "grain", "matplotlib"),
    *("tensorboardX", "tyro", "libtpu", "huggingface_hub", "pytest"),
)
CONFIG = {"n_vocab": 13, "d_model": 12, "heads": 3, "d_ff": 17, "n_layers": 2}
# Hides the packages that an environment variable names, as if they were not installed.
BLOCKER = """\
import importlib.abc, os, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in os.environ["BLOCKED"].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

if os.environ.get("BLOCKED"):
    sys.meta_path.insert(0, Blocker())
"""
TEST_OF_A_USER = """\
import numpy as np
import pytest
import torch
from flax import nnx

from jaxmodels.layers import Linear


class TorchMLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(7, 11), torch.nn.Linear(11, 5)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class FlaxMLP(nnx.Module):
    def __init__(self, *, rngs):
        self.up, self.down = Linear(7, 11, rngs=rngs), Linear(11, 5, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.tanh(self.up(x)))


@pytest.mark.parity_case(steps=2)
def test_port():
    x = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    return TorchMLP(), FlaxMLP(rngs=nnx.Rngs(0)), {"x": x}
"""
EXPERIMENT_OF_A_USER = """\
import dataclasses

from jaxmodels.training.config import Config
from jaxmodels.training.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class MyConfig(Config):
    PRESETS = ("small",)
    d_model: int = 12

    @classmethod
    def small(cls):
        \"\"\"Seconds on a CPU.\"\"\"
        return cls()


class EXPERIMENT(Experiment[MyConfig]):
    config_class = MyConfig
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling", reason="builds the wheel; extra dev")
    folder = tmp_path_factory.mktemp("wheel")
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """bin/ of a fresh environment with the wheel, which finds its dependencies in the running environment.

    Those are found by a .pth file, whose folder's own .pth files (an editable install of the checkout) are not read.
    """
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    install = ["--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "running.pth").write_text(sysconfig.get_path("purelib") + "\nimport blocker\n")
    (site / "blocker.py").write_text(BLOCKER)
    return folder / "bin"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A user's folder, with a train.py and a test."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "train.py").write_text("print('the train.py of the user')\n")
    (folder / "test_port.py").write_text(TEST_OF_A_USER)
    (folder / "my_experiment.py").write_text(EXPERIMENT_OF_A_USER)
    (folder / "any.pt").write_bytes(b"not read")
    (folder / "model.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def run(environment, project):
    """Run a command of the environment in the user's folder: (exit code, standard output, standard error)."""

    def call(command, *arguments, blocked=(), cwd=project):
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
        done = subprocess.run(
            [environment / command, *arguments],
            cwd=cwd,
            env=inherited | {"JAX_PLATFORMS": "cpu", "COLUMNS": "120", "BLOCKED": ",".join(blocked)},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    return call


def one_line(text):
    assert len(text.splitlines()) == 1, text
    return text.rstrip("\n")


def test_the_wheel_has_the_packages_and_their_data_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"jaxmodels", "parity", "torch_ref", "jaxmodels-0.2.0.dist-info"}
    assert {f"{package}/py.typed" for package in ("jaxmodels", "parity", "torch_ref")} <= set(names)
    fixtures = [path.relative_to(ROOT).as_posix() for path in (ROOT / "parity" / "golden" / "fixtures").iterdir()]
    assert len(fixtures) > 20
    assert set(fixtures) <= set(names)
    python = [path.relative_to(ROOT).as_posix() for p in ("jaxmodels", "parity") for path in (ROOT / p).rglob("*.py")]
    assert set(python) <= set(names)


def test_the_installed_packages_are_those_of_the_wheel(run, environment):
    program = "import jaxmodels, parity, torch_ref\nfor m in (jaxmodels, parity, torch_ref): print(m.__file__)"
    code, out, err = run("python", "-c", program)
    assert (code, err) == (0, "")
    assert all(Path(line).is_relative_to(environment.parent) for line in out.splitlines())
    code, out, _ = run("python", "-c", "import jaxmodels; print(jaxmodels.__version__, *dir(jaxmodels))")
    assert out.split()[0] == "0.2.0"
    assert {"load", "save", "register"} <= set(out.split())
    code, out, _ = run("python", "-c", "import parity; print(*dir(parity))")
    assert {"check", "suggest", "sweep", "trajectory", "replay"} <= set(out.split())


def test_train_is_the_users_own(run):
    assert run("python", "-m", "train") == (0, "the train.py of the user\n", "")


def test_the_command_says_its_version_and_its_subcommands(run):
    assert run("jaxmodels", "--version") == (0, "jaxmodels 0.2.0\n", "")
    for command in (["jaxmodels"], ["python", "-m", "jaxmodels"]):
        code, out, _ = run(*command, "--help")
        assert code == 0
        assert out.startswith(f"usage: {' '.join(command)} ")
        listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and not line.startswith("  -")]
        assert tuple(listed) == SUBCOMMANDS
    for arguments in ([], ["no-such-command"]):
        code, out, err = run("jaxmodels", *arguments)
        assert (code, out) == (2, "")
        assert all(name in one_line(err) for name in SUBCOMMANDS)


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_each_subcommand_has_help_under_the_name_it_was_called_by(run, name):
    code, out, err = run("jaxmodels", name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: jaxmodels {name} ")


def test_the_planner_finds_an_experiment_in_the_current_folder(run):
    code, out, err = run("jaxmodels", "plan", "my_experiment", "--help")
    assert (code, err) == (0, "")
    assert out.startswith("usage: jaxmodels plan my_experiment ")
    assert "--d-model" in out


def test_the_planner_does_not_run_the_train_of_the_user(run):
    code, out, err = run("jaxmodels", "plan", "rope")
    assert (code, out) == (2, "")
    assert "rope" in one_line(err)


def test_parity_has_help_a_version_and_its_cases(run):
    code, out, _ = run("parity", "--help")
    assert code == 0
    assert out.startswith("usage: parity ")
    assert run("parity", "--version")[:2] == (0, "parity 0.2.0\n")
    code, out, _ = run("parity", "--list")
    assert code == 0
    assert len(out.splitlines()) > 30


def test_parity_replays_a_fixture_of_the_package(run):
    code, out, err = run("parity", "rope.rotary", "--replay", blocked=OPTIONAL)
    assert code == 0, err
    assert "rope.rotary" in out


def test_a_checkpoint_is_converted_and_comes_back(run, project):
    program = "from torch_ref.transformer import AutoregressiveTransformer as M; import torch; "
    program += f"torch.save(M(**{CONFIG}, attention='rotary').state_dict(), 'model.pt')"
    assert run("python", "-c", program)[0] == 0
    code, out, err = run(
        "jaxmodels", "convert", "torch", "--model", "rope", "--config", "model.json", "model.pt", "OUT"
    )
    assert (code, err) == (0, "")
    assert "AutoregressiveTransformer" in one_line(out)
    assert run("jaxmodels", "convert", "torch", "OUT", "back.pt")[0] == 0
    program = "import torch; a, b = map(torch.load, ('model.pt', 'back.pt')); "
    program += "print(a.keys() == b.keys(), all(torch.equal(a[k], b[k]) for k in a))"
    assert run("python", "-c", program)[1] == "True True\n"
    code, out, err = run("jaxmodels", "inspect", project / "nowhere")
    assert (code, out) == (2, "")
    assert one_line(err).startswith(f"jaxmodels inspect: {project / 'nowhere'} ")


def test_the_pytest_plugin_judges_a_test_of_the_user(run):
    code, out, err = run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--parity-json", "readings.json")
    assert code == 0, out + err
    assert "parity: 1 of 1 pairs agree" in out


@pytest.mark.parametrize(
    ("command", "extra", "module"),
    [
        (
            "jaxmodels convert torch --model rope --config model.json any.pt new",
            "torch",
            "torch",
        ),
        ("jaxmodels generate folder --prompt x --tokenizer any.pt", "neox", "tokenizers"),
        ("jaxmodels neighbors index --prompt x", "retro", "faiss"),
        ("jaxmodels evaluate run", "train", "grain"),
        ("jaxmodels sample run", "train", "grain"),
        ("jaxmodels tokenize text tokens", "train", "grain"),
        ("jaxmodels plot run", "train", "grain"),
        ("jaxmodels plan rope", "train", "grain"),
        ("parity rope", "torch", "torch"),
        ("python -m parity rope", "torch", "torch"),
    ],
)
def test_a_missing_extra_is_one_line_that_names_it(run, command, extra, module):
    code, out, err = run(*command.split(), blocked=[module])
    assert (code, out) == (2, "")
    assert module in one_line(err)
    assert f"pip install 'jaxmodels[{extra}]'" in err


@pytest.mark.parametrize("module", ["tyro", "filelock", "grain"])
def test_a_script_of_a_checkout_names_the_extra_that_it_needs(run, module):
    code, out, err = run("python", "-m", "train.rope", "--help", blocked=[module], cwd=ROOT)
    assert (code, out) == (2, "")
    assert one_line(err).startswith("python -m train.rope: needs ")
    assert "pip install 'jaxmodels[train]'" in err


def test_the_core_needs_jax_flax_and_numpy_alone(run):
    program = (
        "import jaxmodels.transformer, jaxmodels.feedback, jaxmodels.retro, jaxmodels.neox, jaxmodels.synthesizer\n"
    )
    program += "import parity, jaxmodels.convert, jaxmodels.generate\nprint('imported')"
    assert run("python", "-c", program, blocked=OPTIONAL) == (0, "imported\n", "")
    assert run("jaxmodels", "--version", blocked=OPTIONAL)[0] == 0
    assert run("jaxmodels", "convert", "--help", blocked=OPTIONAL)[0] == 0
