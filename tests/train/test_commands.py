"""Commands where something is missing: a package of an extra, the repository's scripts, fields of older versions."""

import json
import re
from pathlib import Path

import pytest

from jaxmodels.text import CharVocabulary
from jaxmodels.training.config import Options
from jaxmodels.training.experiment import Experiment
from jaxmodels.training.runs.folder import read_about, saved_experiment, write_about
from jaxmodels.training.script import Session, main, parse
from jaxmodels.training.signals import Stop
from jaxmodels.training.tokenize import open_tokens
from tests.train_common import ROOT, start
from train import neox, retro, rope, rope_value

WITHOUT = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
"""


@pytest.mark.parametrize(
    ("program", "module"), [("train.rope", "tyro"), ("train.plan", "optax"), ("train.evaluate", "grain")]
)
def test_a_missing_package_is_one_line_that_names_the_extra(program, module, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT.format(module=module))
    process = start(program, "--help", PYTHONPATH=f"{tmp_path}:{ROOT}")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert re.fullmatch(rf"python -m {program}: .*\b{module}\b.*'jaxmodels\[train\]'\n", err)


def test_output_in_a_notebook_goes_to_the_stream_that_a_user_can_redirect(monkeypatch, capsys):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    Session(Options(), Stop(), "again").console.print("a line")
    assert capsys.readouterr().out == "a line\n"


@pytest.fixture
def run(tmp_path) -> Path:
    """Folder of a run of train.rope_value, without a checkpoint."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    write_about(tmp_path / "run", rope_value.RopeValue(rope_value.Config()), "0" * 64, {})
    return tmp_path / "run"


@pytest.mark.slow
def test_the_train_of_another_project_is_not_imported(run, tmp_path):
    (tmp_path / "train.py").write_text("raise SystemExit('imported')")
    process = start("jaxmodels", "evaluate", "run", cwd=tmp_path, PYTHONPATH=str(ROOT))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert re.fullmatch(r"jaxmodels evaluate: train\.rope_value .*checkout\n", err.replace("python -m ", ""))


def test_a_run_needs_its_script_only_if_that_says_how_it_is_evaluated(run, tmp_path):
    assert read_about(run).standalone is False
    assert type(saved_experiment(run)) is rope_value.RopeValue
    write_about(tmp_path, rope.Rope(rope.Config(seq_len=7)), "0" * 64, {})
    assert read_about(tmp_path).standalone is True
    experiment = saved_experiment(tmp_path)
    assert type(experiment) is Experiment
    assert experiment.config.seq_len == 7


@pytest.mark.parametrize("experiment", [rope_value.RopeValue(rope_value.Config()), retro.Retro(retro.Config())])
def test_a_run_that_needs_its_script_does_not_say_that_it_needs_none(experiment, tmp_path):
    """It would be evaluated on other examples, such as without neighbors."""
    write_about(tmp_path, experiment, "0" * 64, {})
    about = json.loads((tmp_path / "config.json").read_text()) | {"standalone": True}
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"/config\.json has standalone=true, must be false: runs of train\.r"):
        saved_experiment(tmp_path)


def test_a_run_of_an_older_version_is_read_with_its_script(run):
    about = json.loads((run / "config.json").read_text())
    del about["standalone"]
    (run / "config.json").write_text(json.dumps(about))
    assert read_about(run).standalone is None
    assert saved_experiment(run).config == rope_value.Config()


def test_a_saved_run_downloads_nothing_that_the_user_has_not_named(tmp_path, monkeypatch):
    (tmp_path / "sea.txt").write_text("The sea is wide. " * 20)
    monkeypatch.setattr("jaxmodels.convert.hub.download", lambda *args: pytest.fail("the Hub was asked"))
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: pytest.fail("a network was used"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = {"checkpoint": "someone/model", "text": "tiny_shakespeare"}
    for name, value in flags.items():
        run = tmp_path / name
        (run / "checkpoints").mkdir(parents=True)
        config = neox.Config(**({"text": str(tmp_path / "sea.txt")} | {name: value}))
        write_about(run, neox.Neox(config), "0" * 64, {})
        about = json.loads((run / "config.json").read_text()) | {"standalone": False}
        (run / "config.json").write_text(json.dumps(about))
        saved, ids = saved_experiment(run), CharVocabulary.of("The sea is wide. ")
        for refused in (
            lambda run=run: main(neox.Neox, "python -m train.neox", ["--resume", str(run)]),
            lambda saved=saved, ids=ids, run=run: saved.held_out(run, ids, "0" * 64),
        ):
            with pytest.raises(ValueError, match=f"{name}='{value}'.* --{name} {value}"):
                refused()
        named, _ = parse(neox.Neox, "python -m train.neox", ["--resume", str(run), f"--{name}={value}"])
        assert name not in named.unnamed


def test_a_run_of_others_names_no_folder_with_any_number_of_files(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxmodels.training.runs.unnamed.FILES", 3)
    texts, run = tmp_path / "texts", tmp_path / "run"
    (texts / "inside").mkdir(parents=True)
    run.mkdir()
    for name in ("a.txt", "inside/b.txt"):
        (texts / name).write_text("The sea is wide. " * 20)
    write_about(run, rope.Rope(rope.Config(text=str(texts), seq_len=7)), "0" * 64, {})
    vocabulary = CharVocabulary.of("The sea is wide. ")
    with pytest.raises(ValueError, match=r"has changed since|cannot be read"):  # its files are read
        saved_experiment(run).held_out(run, vocabulary, "0" * 64)
    (texts / "c.txt").write_text("The sea is wide. ")
    with pytest.raises(ValueError, match=r"of the run is a folder of more than 3 files.* --text "):
        saved_experiment(run).held_out(run, vocabulary, "0" * 64)


def test_a_saved_experiment_is_of_the_run_s_own_checkpoint(run, monkeypatch):
    (run / "checkpoints" / "3").mkdir()
    (run / "checkpoints" / "3" / "complete.json").write_text("{}")
    resumed: list[Path] = []
    monkeypatch.setattr(Experiment, "resume", lambda self, run: resumed.append(run))
    saved_experiment(run)
    assert set(resumed) == {run}


@pytest.mark.parametrize("name", ["original", "token_ids"])
def test_entries_about_the_original_are_objects(name, run):
    about = json.loads((run / "config.json").read_text()) | {name: "x"}
    (run / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=f"config.json has {name}='x'.*object"):
        read_about(run)


def test_an_empty_text_is_not_the_current_folder():
    with pytest.raises(ValueError, match="text=''"):
        open_tokens("")
