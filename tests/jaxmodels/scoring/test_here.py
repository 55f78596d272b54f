"""Guards of lm-eval: nothing in the current folder or beside a tokenizer takes the place of what is published."""

import contextlib
import importlib
import importlib.util
import json
import logging
from pathlib import Path

import pytest

from tests.jaxmodels.scoring.harness import TASKS, WARNINGS

lm_eval = pytest.importorskip("lm_eval")

pytestmark = WARNINGS


@pytest.mark.slow  # the import of evaluate takes seconds
@pytest.mark.parametrize("name", ["rouge", "Some/metric"])
@pytest.mark.parametrize("caught", [False, True])
def test_a_folder_with_the_code_of_a_metric_is_refused(tmp_path, monkeypatch, capsys, name, caught):
    evaluate = pytest.importorskip("evaluate")
    import lm_eval.__main__

    from jaxmodels.scoring.lm_eval import main

    def evaluated() -> None:  # as lm-eval's tasks do
        with contextlib.suppress(ValueError) if caught else contextlib.nullcontext():
            evaluate.load(name)

    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / f"{Path(name).name}.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", evaluated)
    assert main(["run", "--tasks", "any"]) == 2
    shown = f"jaxmodels lm-eval: {name}/{Path(name).name}.py in the current folder would run as the metric"
    assert capsys.readouterr().err.startswith(shown)


def test_a_folder_without_the_code_of_a_metric_is_no_metric(tmp_path, monkeypatch):
    from jaxmodels.scoring.here import checks_of, metrics_not_here

    monkeypatch.chdir(tmp_path)
    (tmp_path / "rouge").mkdir()
    (tmp_path / "rouge" / "results.py").touch()
    with metrics_not_here():
        (check,) = checks_of("evaluate.loading", "evaluation_module_factory")
        for name in ("rouge", "bleu", "Some/bleu", "rouge/results", "./rouge", str(tmp_path / "rouge")):
            check(name)
        (tmp_path / "rouge" / "rouge.py").touch()
        check("./rouge")
        check("rouge/results")
    for name in ("rouge", "rouge/", "rouge/rouge.py"):
        with pytest.raises(ValueError, match=r"rouge/rouge\.py in the current folder"), metrics_not_here():
            checks_of("evaluate.loading", "evaluation_module_factory")[0](name)


def test_code_that_lies_beside_a_tokenizer_is_not_run_by_a_task(tmp_path, monkeypatch, capsys):
    """Tasks of RULER read the tokenizer of --model_args with trust_remote_code=True."""
    transformers = pytest.importorskip("transformers")
    import datasets
    import lm_eval.__main__

    from jaxmodels.scoring.lm_eval import main

    def evaluated() -> None:
        transformers.AutoTokenizer.from_pretrained(str(tmp_path), trust_remote_code=True)

    (tmp_path / "code.py").write_text("raise SystemExit('imported')")
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["code.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", evaluated)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert main(["run", "--tasks", "any"]) == 2
    assert capsys.readouterr().err.startswith(f"jaxmodels lm-eval: {tmp_path} names code of its own")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_TRUST_REMOTE_CODE", True, raising=False)  # --trust_remote_code
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(SystemExit, match="imported"):
        main(["run", "--tasks", "any"])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_TRUST_REMOTE_CODE", False, raising=False)
    for argument in ("trust_remote_code=False", '{"trust_remote_code": false}', "source=./trust_remote_code"):
        assert main(["run", "--tasks", "any", "--model_args", argument]) == 2
    with pytest.raises(SystemExit, match="imported"):
        main(["run", "--tasks", "any", "--model", "hf", "--model_args", "pretrained=x,trust_remote_code=True"])


def test_the_file_of_a_tokenizer_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    import lm_eval.__main__

    from jaxmodels.scoring.lm_eval import main

    def evaluated() -> None:
        transformers.AutoTokenizer.from_pretrained("model/tokenizer.json")

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", evaluated)
    assert main(["run", "--tasks", "any"]) == 2
    assert capsys.readouterr().err.startswith("jaxmodels lm-eval: tokenizer=model/tokenizer.json is a file; tasks")


def test_a_function_is_checked_in_a_module_that_is_imported_later(tmp_path, monkeypatch):
    from jaxmodels.scoring.here import checked

    (tmp_path / "loaded_later.py").write_text("def load(path):\n    return path\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def check(path: str) -> None:
        if path == "bad":
            raise ValueError(f"path={path!r}")

    def use() -> None:
        with checked("loaded_later", "load", check):
            assert importlib.util.find_spec("loaded_later") is not None  # which imports nothing yet
            load = importlib.import_module("loaded_later").load
            assert load("good") == "good"
            with contextlib.suppress(ValueError):
                load("bad")

    with pytest.raises(ValueError, match="path='bad'"):
        use()
    load = importlib.import_module("loaded_later").load
    assert load("bad") == "bad"
    with pytest.raises(ValueError, match="path='bad'"), checked("loaded_later", "load", check):
        load("bad")  # under the name that was imported before


def test_records_of_lm_eval_cannot_steer_a_terminal(monkeypatch, caplog):
    import lm_eval.__main__

    from jaxmodels.scoring.lm_eval import main

    def evaluated() -> None:  # as --write_out logs a text
        logging.getLogger("lm_eval").warning("of %s:\n%s", "a task", "\x1b[2J")
        made = logging.getLogRecordFactory()("lm_eval", logging.INFO, "a.py", 1, "%(a)s", ({"b": 1},), None)
        assert made.args == {"b": 1}  # which does not fit, as logging will say

    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", evaluated)
    assert main(["run", "--tasks", "any"]) == 0
    assert caplog.messages == ["of a task:\n\\x1b[2J"]


def test_git_is_not_asked_about_the_current_folder(tmp_path, monkeypatch):
    import lm_eval.__main__
    import lm_eval.evaluator
    import lm_eval.loggers.utils

    from jaxmodels.scoring.lm_eval import main

    def evaluated() -> None:  # as lm-eval's simple_evaluate ends
        found.update(git_hash=lm_eval.evaluator.get_git_commit_hash())
        lm_eval.evaluator.add_env_info(found)

    found: dict = {}
    git, own = tmp_path / ".git", lm_eval.evaluator.get_git_commit_hash
    for folder in ("objects", "refs/heads", "here"):
        (git / folder).mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "refs" / "heads" / "main").write_text("1" * 40)
    (git / "config").write_text(
        '[core]\n\trepositoryformatversion = 1\n[extensions]\n\tpartialClone = origin\n[remote "origin"]\n'
        f'\turl = .\n\tpromisor = true\n\tuploadpack = "touch {tmp_path}/ran; false"\n'
    )
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / ".git").write_text(f"gitdir: {tmp_path}/other")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "HEAD").write_text(f"ref: {tmp_path}/secret")
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", evaluated)
    for folder in (tmp_path, tmp_path / "here"):
        monkeypatch.chdir(folder)
        assert main(["run", "--tasks", "any"]) == 0
        assert found["git_hash"] is None
        assert found["upper_git_hash"] is None
    assert found["lm_eval_version"]
    assert not (tmp_path / "ran").exists()
    assert lm_eval.evaluator.get_git_commit_hash is own


def task_here(monkeypatch, tmp_path, **settings) -> int:
    """Exit code of the command in a folder with the folders json and Some/texts, for a group of one task."""
    import lm_eval.__main__
    from lm_eval.tasks import TaskManager

    from jaxmodels.scoring.lm_eval import main

    (tmp_path / "json").mkdir()
    (tmp_path / "Some" / "texts").mkdir(parents=True)
    (tmp_path / "Some" / "texts" / "test.jsonl").write_text('{"text": "mine"}\n')
    (tmp_path / "tasks").mkdir()
    task = {"task": "one", "test_split": "test", **TASKS["rolling"], **settings}
    (tmp_path / "tasks" / "one.yaml").write_text(json.dumps(task))
    (tmp_path / "tasks" / "all.yaml").write_text(json.dumps({"group": "all", "task": ["one"]}))
    monkeypatch.chdir(tmp_path)

    def evaluated() -> None:  # as lm-eval, which reads its own 15,000 tasks too
        loaded = TaskManager(include_path="tasks", include_defaults=False).load(["all"])
        assert list(loaded["tasks"]["one"].test_docs()["text"]) == ["mine"]

    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", evaluated)
    return main(["run", "--tasks", "all"])


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("name", ["Some/texts", "Some"])
def test_a_folder_with_the_name_of_a_data_set_is_refused(tmp_path, monkeypatch, capsys, name):
    import datasets.load

    before = datasets.load.dataset_module_factory
    assert task_here(monkeypatch, tmp_path, dataset_path=name) == 2
    assert capsys.readouterr().err.startswith(f"jaxmodels lm-eval: {name} in the current folder would be read")
    assert datasets.load.dataset_module_factory is before


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize(
    "settings",
    [
        {"dataset_path": "./Some/texts"},
        {"dataset_path": "{tmp_path}/Some/texts"},
        {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "Some/texts/test.jsonl"}}},
    ],
)
def test_a_folder_that_a_task_names_as_one_is_read(tmp_path, monkeypatch, settings):
    settings["dataset_path"] = settings["dataset_path"].format(tmp_path=tmp_path)
    assert task_here(monkeypatch, tmp_path, **settings) == 0
