"""The model type of lm-evaluation-harness, compared with lm-eval's own Hugging Face model on local tasks."""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from jaxmodels.text import CharVocabulary, load_corpus
from tests.common import language_model
from tests.jaxmodels.scoring.harness import TASKS, WARNINGS
from tests.jaxmodels.scoring.published import END, hugging_face_folder
from tests.train_common import start

ROOT = Path(__file__).parents[3]
TEXT = load_corpus("python_docs")

lm_eval = pytest.importorskip("lm_eval")

pytestmark = WARNINGS


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
