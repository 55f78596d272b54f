"""The model type of lm-evaluation-harness, compared with lm-eval's own Hugging Face model on local tasks."""

import contextlib
import importlib
import importlib.util
import json
import logging
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from jaxmodels.text import CharVocabulary, load_corpus
from tests.common import language_model
from tests.jaxmodels.scoring.published import END, hugging_face_folder
from tests.train_common import start

ROOT = Path(__file__).parents[3]
TEXT = load_corpus("python_docs")

lm_eval = pytest.importorskip("lm_eval")

# lm-eval and the libraries that it imports.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lm_eval"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": name, "aggregation": "mean"} for name in ("acc", "acc_norm")],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 23, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return hugging_face_folder(tmp_path_factory.mktemp("published") / "model")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Folder of tasks over a local file, as --include_path takes it."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = []
    for i in range(11):
        text = TEXT[1000 + 97 * i :]
        question, choices = text[: 7 + 5 * i], [text[60:61], text[61:64], " a", text[64:75]]
        documents.append({"question": question, "choices": choices, "answer": i % 4, "text": text[: 31 * i + 1]})
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, task in TASKS.items():
        source = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"{name}.yaml").write_text(json.dumps({**source, "test_split": "test", **task}))
    return folder


@pytest.fixture
def _offline(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def instances(kind: str, *arguments: tuple) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]


@pytest.fixture(scope="module")
def both(folder):
    """The same checkpoint in lm-eval's own model and in ours."""
    from lm_eval.models.huggingface import HFLM

    from jaxmodels.scoring.lm_eval import JaxModelsLM

    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=3), JaxModelsLM(str(folder), batch_size=3)


PAIRS = [
    ("", "The import statement"),
    ("The with statement ", "is used"),
    ("The with statement ", "is usee"),
    ("A class", " definition"),
    (f"{END}A class", " body"),
    (TEXT[500:900], " is longer than the model's context"),
    ("ß", "ö"),
    ("x", " y"),
    ("x", " z"),
]


def test_log_likelihoods_are_those_of_hflm(both):
    theirs, ours = (lm.loglikelihood(instances("loglikelihood", *PAIRS), disable_tqdm=True) for lm in both)
    np.testing.assert_allclose([one[0] for one in ours], [one[0] for one in theirs], rtol=1e-5)
    assert [one[1] for one in ours] == [one[1] for one in theirs]


def test_rolling_log_likelihoods_are_those_of_hflm(both):
    texts = [(TEXT[100:n],) for n in (101, 160, 400, 1100)]
    theirs, ours = (lm.loglikelihood_rolling(instances("loglikelihood_rolling", *texts)) for lm in both)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert both[1].loglikelihood_rolling(instances("loglikelihood_rolling", ("",)), disable_tqdm=True) == [0.0]


@pytest.mark.parametrize(
    "settings",
    [
        {"until": ["e"], "max_gen_toks": 23, "do_sample": False},
        {"until": "\n", "max_gen_toks": 5},
        {"max_gen_toks": 41, "temperature": 0.0},
    ],
)
@pytest.mark.slow
def test_generated_texts_are_those_of_hflm(both, settings):
    contexts = [TEXT[n : n + length] for n, length in ((0, 3), (50, 31), (200, 17), (300, 90), (400, 300))]
    requests = [(context, dict(settings)) for context in contexts]
    theirs, ours = (lm.generate_until(instances("generate_until", *requests), disable_tqdm=True) for lm in both)
    assert ours == theirs


@pytest.mark.slow
def test_sampled_texts_depend_on_the_seed_alone(folder):
    from jaxmodels.scoring.lm_eval import JaxModelsLM

    def written(seed):
        lm = JaxModelsLM(str(folder), seed=seed)
        settings = {"max_gen_toks": 7, "do_sample": True, "temperature": 1.5, "top_k": 50}
        return lm.generate_until(instances("generate_until", ("The", settings), ("A", settings)), disable_tqdm=True)

    assert written(0) == written(0) != written(1)


def test_chat_templates_are_those_of_hflm(folder, tmp_path):
    from lm_eval.models.huggingface import HFLM

    from jaxmodels.scoring.lm_eval import JaxModelsLM

    chat = shutil.copytree(folder, tmp_path / "chat")
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    (chat / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}[assistant] {% endif %}")
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    theirs, ours = HFLM(str(chat), device="cpu", dtype="float32"), JaxModelsLM(str(chat))
    assert ours.apply_chat_template(history) == theirs.apply_chat_template(history)
    assert ours.apply_chat_template(history, False) == theirs.apply_chat_template(history, False)
    assert ours.chat_template(True) == theirs.chat_template(True)
    with pytest.raises(ValueError, match="no chat template"):
        JaxModelsLM(str(folder)).apply_chat_template(history)


@pytest.mark.slow  # lm-eval reads its 15,000 tasks
@pytest.mark.usefixtures("_offline")
def test_tasks_have_the_results_of_hflm(folder, tasks):
    from lm_eval.tasks import TaskManager

    import jaxmodels.scoring.lm_eval  # noqa: F401  # registers the model type

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = []
    for model, source in (("hf", "pretrained"), ("jaxmodels", "source")):
        results = lm_eval.simple_evaluate(
            model=model,
            model_args={source: str(folder), "dtype": "float32"},
            tasks=list(TASKS),
            task_manager=manager,
            batch_size=4,
            device="cpu",
            log_samples=True,
        )
        found.append(results)
    theirs, ours = found
    assert [set(one["results"]) for one in found] == [set(TASKS)] * 2
    for task, values in theirs["results"].items():
        for metric, value in values.items():
            if isinstance(value, float):
                assert ours["results"][task][metric] == pytest.approx(value, rel=1e-5), (task, metric)
    texts = [[sample["resps"] for sample in one["samples"]["write"]] for one in found]
    assert texts[0] == texts[1]
    assert len({str(text) for text in texts[0]}) > 1


@pytest.mark.slow  # processes
@pytest.mark.parametrize("command", ["lm_eval", "jaxmodels"])
def test_command_line(command, folder, tasks, tmp_path):
    """`python -m lm_eval --model jaxmodels` by the entry point of pyproject.toml, and `jaxmodels lm-eval`."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        entries = tomllib.load(file)["project"]["entry-points"]["torch.backends"]
    installed = tmp_path / "site" / "jaxmodels_under_test-0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: jaxmodels-under-test\nVersion: 0\n")
    lines = "".join(f"{name} = {target}\n" for name, target in entries.items())
    (installed / "entry_points.txt").write_text(f"[torch.backends]\n{lines}")
    arguments = ["--model", "jaxmodels"] if command == "lm_eval" else []
    arguments += ["--model_args", f"source={folder},batch_size=2", "--include_path", tasks, "--tasks", "choice,rolling"]
    arguments += ["--output_path", tmp_path / "results"]
    process = start(
        *(["lm_eval"] if command == "lm_eval" else ["jaxmodels", "lm-eval"]),
        *arguments,
        PYTHONPATH=f"{ROOT}:{tmp_path / 'site'}",
        HF_HOME=str(tmp_path / "hf"),
        HF_DATASETS_OFFLINE="1",
        HF_HUB_OFFLINE="1",
    )
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    (file,) = (tmp_path / "results").rglob("results_*.json")
    assert json.loads(file.read_text())["results"].keys() == {"choice", "rolling"}
    assert "bits_per_byte" in out


def test_the_hook_does_nothing_without_lm_eval():
    program = (
        "import sys; from jaxmodels.process.lm_eval import register_if_used; register_if_used(); "
        "assert not {'lm_eval', 'jax', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_a_model_without_special_tokens_needs_a_prefix(tmp_path):
    import jaxmodels
    from jaxmodels.scoring.lm_eval import JaxModelsLM

    jaxmodels.save(language_model("rotary"), tmp_path / "model")
    CharVocabulary("abcdefghijklmnopqrstuvw").save(tmp_path / "model" / "vocabulary.json")
    requests = instances("loglikelihood", ("", "abc"), ("ab", "c"))
    lm = JaxModelsLM(str(tmp_path / "model"))
    with pytest.raises(ValueError, match="prefix_token_id"):
        lm.loglikelihood(requests, disable_tqdm=True)
    found = JaxModelsLM(str(tmp_path / "model"), prefix_token_id=3).loglikelihood(requests, disable_tqdm=True)
    assert all(log_prob < 0 for log_prob, _ in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": None}, "source is missing"),
        ({"pretrained": "x"}, "unknown pretrained.*source"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": "many"}, "batch_size=many"),
        ({"max_length": "abc"}, "max_length='abc'"),
        ({"max_length": -5}, "max_length=-5"),
        ({"max_length": 1.5}, "max_length=1.5"),
        ({"max_gen_toks": 0}, "max_gen_toks=0"),
        ({"seed": "x"}, "seed='x'"),
        ({"prefix_token_id": 10**9}, "prefix_token_id=1000000000"),
        ({"experiment": "train.rope"}, "experiment='train.rope'"),
        ({"dtype": "foo"}, "dtype='foo' .*float32"),
    ],
)
def test_bad_arguments_are_refused(folder, arguments, message):
    from jaxmodels.scoring.lm_eval import JaxModelsLM

    with pytest.raises(ValueError, match=message):
        JaxModelsLM.create_from_arg_obj({"source": str(folder)} | arguments, {"batch_size": 1, "device": None})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_fairies": 3, "max_gen_toks": 5}, "num_fairies.*top_k"),
        ({"num_beams": 2, "max_gen_toks": 5}, "num_beams"),
        ({"max_gen_toks": 61}, "max_gen_toks=61 .*60"),
    ],
)
def test_bad_generation_settings_are_refused(both, settings, message):
    with pytest.raises(ValueError, match=message):
        both[1].generate_until(instances("generate_until", ("The", settings)), disable_tqdm=True)


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


def test_a_continuation_without_tokens_is_refused(tmp_path, folder):
    """A tokenizer may delete characters: the probability of nothing is 1, the best of all choices."""
    from jaxmodels.scoring.lm_eval import JaxModelsLM

    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    content = json.loads(file.read_text()) | {
        "normalizer": {"type": "Replace", "pattern": {"String": "b"}, "content": ""}
    }
    file.write_text(json.dumps(content))
    (tmp_path / "model" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END})
    )
    ours = JaxModelsLM(str(tmp_path / "model"))
    for context in ("", "The"):
        with pytest.raises(ValueError, match=rf"{tmp_path}.* continuation 'b' has no tokens"):
            ours.loglikelihood(instances("loglikelihood", (context, "a"), (context, "b")), disable_tqdm=True)


@pytest.mark.slow
def test_a_bos_that_is_asked_for_is_added_as_by_hflm(folder):
    from lm_eval.models.huggingface import HFLM

    from jaxmodels.scoring.lm_eval import JaxModelsLM

    found = []
    for kind in (HFLM, JaxModelsLM):
        named = {"device": "cpu", "dtype": "float32"} if kind is HFLM else {}
        made = kind(str(folder), add_bos_token=True, batch_size=2, **named)
        found.append([made.tok_encode(text) for text in ("The import", f"{END}A class", "")])
    assert found[0] == found[1]


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
