"""An experiment of one's own, from the template: trained, resumed, evaluated, sampled and planned in any folder."""

import ast
import importlib.util
import re
import sys

import pytest

from jaxmodels.io.steps import steps
from jaxmodels.training import metrics
from jaxmodels.training.commands import new
from jaxmodels.training.experiment import experiment_class, script_of
from tests.train_common import ROOT, TEXT, start


def test_a_new_file_has_its_own_name(tmp_path, capsys):
    file = tmp_path / "mine.py"
    assert new.main([str(file)], "jaxmodels new") == 0
    assert "python" in capsys.readouterr().out
    text = file.read_text()
    assert '"mine.Model"' in text
    assert new.NAME not in text
    names = {node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    assert names == {"Model", "Config", "MyExperiment"}


@pytest.mark.parametrize("name", ["mine.py", "3x.py", "mine", "class.py", "a-b.py"])
def test_a_file_that_exists_or_is_no_module_is_refused(name, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("x")
    assert new.main([str(tmp_path / name)], "jaxmodels new") == 2
    assert re.fullmatch(rf"jaxmodels new: FILE={tmp_path}/{name} .*\n", capsys.readouterr().err)
    assert (tmp_path / "mine.py").read_text() == "x"


def test_an_experiment_is_found_by_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert new.main([str(tmp_path / "found_by_file.py")], "jaxmodels new") == 0
    kind = experiment_class(str(tmp_path / "found_by_file.py"))
    assert (kind.__name__, script_of(kind)) == ("MyExperiment", "found_by_file")
    with pytest.raises(ValueError, match=r"experiment='\S*/absent\.py' .*\.py"):
        experiment_class(str(tmp_path / "absent.py"))


@pytest.mark.slow
def test_an_experiment_of_ones_own_does_what_the_scripts_do(tmp_path, compile_cache):
    (tmp_path / "a text.txt").write_text(TEXT)

    def run(*arguments: object, code: int = 0) -> str:
        process = start(*arguments, cwd=tmp_path, PYTHONPATH=str(ROOT))
        out, err = process.communicate(timeout=300)
        assert process.returncode == code, err
        return out if code == 0 else err

    run("jaxmodels", "new", "mine.py")
    shape = ["--d-model", 8, "--d-ff", 16, "--seq-len", 11, "--batch-size", 4, "--schedule", "constant"]
    flags = [*shape, "--every", 3, "--text", "a text.txt", "--no-tensorboard", "--compile-cache", compile_cache]
    out = run("mine", *flags, "--steps", 5, "--out", "runs/a b")
    assert "jaxmodels sample 'runs/a b' --experiment mine" in out
    out = run("mine", "--resume", "runs/a b", "--steps", 7, "--no-tensorboard")
    assert "resuming at step 5" in out
    folder = tmp_path / "runs" / "a b"
    assert steps(folder / "checkpoints")[-1] == 7
    lines = metrics.read(folder)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 8))
    out = run("jaxmodels", "evaluate", "runs/a b", "--experiment", "mine")
    loss = float(re.search(r"loss +([\d.]+)", out)[1])
    assert loss == pytest.approx(lines[-1]["validation_loss"], abs=1e-4)
    assert len(run("jaxmodels", "sample", "runs/a b", "--experiment", "mine", "--prompt", "7", "--length", 9)) == 11
    assert "--from-step" in run("mine", "--help")
    if importlib.util.find_spec("libtpu") is not None:
        assert run("jaxmodels", "plan", "mine", "--topology", "v5e:2x4").rstrip().endswith("fits")
