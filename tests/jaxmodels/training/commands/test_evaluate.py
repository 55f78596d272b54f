"""`python -m train.evaluate`: models of every system, and runs on their held-out data."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import jaxmodels
from jaxmodels.convert.companions import Companions
from jaxmodels.convert.open import open_source
from jaxmodels.feedback import AutoregressiveModel, FeedbackTransformer, FeedbackTransformerKV
from jaxmodels.neox import NeoX, NeoXConfig, quantize
from jaxmodels.retro import NearestNeighborEncoder, RetroModel
from jaxmodels.scoring import score
from jaxmodels.text import CharVocabulary
from jaxmodels.training.commands import evaluate
from jaxmodels.training.data import Windows, stack
from jaxmodels.training.runs import folder as run_folder
from jaxmodels.training.runs.folder import write_about
from jaxmodels.training.step import token_losses
from jaxmodels.training.tokenize import open_tokens, tokenize
from jaxmodels.transformer import AutoregressiveTransformer
from tests.jaxmodels.io.full_disk import full_disk
from tests.jaxmodels.scoring.published import hugging_face_folder
from tests.jaxmodels.tokenizer import byte_level_tokenizer
from tests.train_common import TEXT
from train import rope, rope_value

VOCABULARY = CharVocabulary("".join(sorted(set(TEXT), reverse=True)))  # not the order that the text alone would give
V, S = len(VOCABULARY), 12


def transformer(attention: str = "rotary", n_vocab: int = V) -> AutoregressiveTransformer:
    return AutoregressiveTransformer(n_vocab, 6, 3, 5, 1, attention, max_len=S, rngs=nnx.Rngs(0))


def feedback(cls) -> AutoregressiveModel:
    return AutoregressiveModel(V, cls(6, 3, 5, 1, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))


def retro() -> RetroModel:
    encoder = NearestNeighborEncoder(4, 1, {0}, 6, 3, 2, 5, rngs=nnx.Rngs(0))
    return RetroModel(V, 6, 1, {0}, 4, 3, 2, 5, encoder, rngs=nnx.Rngs(0))


def neox(stacked: bool) -> NeoX:
    sizes = {"n_vocab": V, "n_hidden": 12, "n_layers": 2, "n_heads": 3, "n_ff": 17, "max_len": S}
    return NeoX(NeoXConfig(**sizes, rope_percentage=0.5), stacked=stacked, rngs=nnx.Rngs(0))


MODELS = {
    "rope": transformer,
    "relative": lambda: transformer("relative"),
    "synthesizer": lambda: transformer("random+dense+vanilla"),
    "feedback": lambda: feedback(FeedbackTransformer),
    "feedback_kv": lambda: feedback(FeedbackTransformerKV),
    "retro": retro,
    "neox": lambda: neox(stacked=True),
    "neox_unstacked": lambda: neox(stacked=False),
    "neox_int8": lambda: quantize(neox(stacked=False)),
}


def scores(*arguments: object) -> None:
    evaluate.print_scores(evaluate.parser().parse_args(list(map(str, arguments))))


def evaluated(capsys, *arguments: object) -> tuple[str, float]:
    """The first line, and the loss."""
    capsys.readouterr()
    scores(*arguments)
    out = capsys.readouterr().out
    return out.splitlines()[0], float(re.search(r"loss +([\d.]+) nats per character", out)[1])


def expected_loss(model, ids: np.ndarray, seq_len: int = S) -> float:
    windows = Windows(ids, seq_len, "given")
    return float(jax.jit(token_losses)(model, stack([windows[i] for i in range(len(windows))])).mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_of_every_system_is_evaluated_on_one_device(name, tmp_path, capsys):
    model = MODELS[name]()
    jaxmodels.save(model, tmp_path / "model")
    VOCABULARY.save(tmp_path / "model" / "vocabulary.json")
    (tmp_path / "text").write_text(TEXT[: 4 * S + 1])
    flags = ["--text", tmp_path / "text", "--seq-len", S, "--batch-size", 3]
    line, loss = evaluated(capsys, tmp_path / "model", *flags)
    assert line == f"{tmp_path / 'text'}: {4 * S} characters predicted"
    assert loss == pytest.approx(expected_loss(model, VOCABULARY.encode(TEXT[: 4 * S + 1])), abs=2e-4)


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path):
    jaxmodels.save(transformer(n_vocab=3), tmp_path / "model")
    VOCABULARY.save(tmp_path / "model" / "vocabulary.json")
    (tmp_path / "text").write_text(TEXT[: 4 * S + 1])
    with pytest.raises(ValueError, match=f"loss is nan over 4 sequences.*{V} characters"):
        scores(tmp_path / "model", "--text", tmp_path / "text", "--seq-len", S)


def test_a_loss_beyond_every_perplexity_and_a_text_of_no_characters_are_printed(tmp_path, capsys, monkeypatch):
    jaxmodels.save(transformer(), tmp_path / "model")
    VOCABULARY.save(tmp_path / "model" / "vocabulary.json")
    (tmp_path / "text").write_text(TEXT[: 4 * S + 1])
    monkeypatch.setattr(evaluate.Evaluation, "__call__", lambda self, state: 1e6)
    monkeypatch.setattr(evaluate, "decoded_size", lambda vocabulary, parts: (0, 0))
    scores(tmp_path / "model", "--text", tmp_path / "text", "--seq-len", S)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[2:]] == ["inf"] * 3


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """Makes a run's folder, whose latest model is the given one."""

    def make(experiment, vocabulary, sha256: str, model) -> Path:
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        vocabulary.save(tmp_path / "run" / "vocabulary.json")
        write_about(tmp_path / "run", experiment, sha256, {})
        monkeypatch.setattr(run_folder, "latest_model", lambda folder, mesh: (model, 1))
        return tmp_path / "run"

    return make


def test_a_run_is_evaluated_in_its_own_vocabulary_and_on_its_own_text(make_run, tmp_path, capsys):
    text, model = tmp_path / "sea.txt", transformer()
    text.write_text(TEXT)
    tokens = open_tokens(str(text), VOCABULARY)
    folder = make_run(rope.Rope(rope.Config(text=str(text), seq_len=S)), VOCABULARY, tokens.sha256, model)
    line, loss = evaluated(capsys, folder, "--loss-chunk=3")
    assert line.startswith(f"held-out part of {text}: ")
    assert loss == pytest.approx(expected_loss(model, tokens.validation), abs=2e-4)
    text.write_text(TEXT.replace("sea", "tea"))
    with pytest.raises(ValueError, match=rf"text='{text}' .*{folder} .*sha256 \w+ now, {tokens.sha256} then.*--text"):
        scores(folder)


def test_a_run_on_a_folder_of_tokens_is_evaluated_on_its_held_out_ones(make_run, tmp_path, capsys):
    (tmp_path / "sea.txt").write_text(TEXT)
    tokenize(str(tmp_path / "sea.txt"), tmp_path / "tokens")
    tokens, model = open_tokens(str(tmp_path / "tokens")), transformer()
    experiment = rope.Rope(rope.Config(text=str(tmp_path / "tokens"), seq_len=S))
    folder = make_run(experiment, tokens.vocabulary, tokens.sha256, model)
    _, loss = evaluated(capsys, folder)
    assert loss == pytest.approx(expected_loss(model, tokens.validation), abs=2e-4)


def test_a_run_without_a_text_is_evaluated_on_its_held_out_problems(make_run, capsys):
    experiment = rope_value.RopeValue(rope_value.Config(seq_len=S))
    task, model = experiment.task(), transformer(n_vocab=len(rope_value.VOCABULARY))
    folder = make_run(experiment, task.vocabulary, task.sha256, model)
    line, loss = evaluated(capsys, folder)
    assert line == f"held-out part of arithmetic: {len(task.validation) * S} characters predicted"
    expected = jax.jit(token_losses)(model, stack(task.validation)).mean()
    assert loss == pytest.approx(float(expected), abs=2e-4)


@pytest.mark.parametrize("flag", ["seq-len", "batch-size", "loss-chunk"])
@pytest.mark.parametrize("value", [0, -3])
def test_a_size_below_1_is_refused_before_any_work(flag, value):
    with pytest.raises(ValueError, match=f"^{flag.replace('-', '_')}={value} .*1"):
        scores("nowhere", f"--{flag}={value}")


@pytest.fixture
def documents(tmp_path) -> dict[str, list[str]]:
    """Texts by file: two of text and one of JSONL, with an empty line."""
    (tmp_path / "a.txt").write_text(TEXT[:40])
    (tmp_path / "b.txt").write_text(TEXT[50:53])
    lines = [json.dumps({"id": i, "text": TEXT[i : 2 * i]}) for i in (5, 1, 30)]
    (tmp_path / "c.jsonl").write_text("\n".join([lines[0], "", *lines[1:]]) + "\n")
    return {"a.txt": [TEXT[:40]], "b.txt": [TEXT[50:53]], "c.jsonl": [TEXT[5:10], TEXT[1:2], TEXT[30:60]]}


def test_several_files_and_jsonl_are_scored_as_documents(documents, tmp_path, capsys):
    model = neox(stacked=True)
    jaxmodels.save(model, tmp_path / "model")
    VOCABULARY.save(tmp_path / "model" / "vocabulary.json")
    files = [tmp_path / name for name in documents]
    scores(tmp_path / "model", "--text", *files, "--jsonl-field", "text", "--json", tmp_path / "scores.json")
    *rows, total = capsys.readouterr().out.splitlines()
    expected = score(model, [text for texts in documents.values() for text in texts], tokenizer=VOCABULARY)
    assert rows[0].split() == ["document", "characters", "loss", "perplexity", "bits/byte", "bits/char"]
    names = [*map(str, files[:2]), *(f"{files[2]}:{line}" for line in (1, 3, 4))]
    for row, name, one in zip(rows[1:], names, expected.documents, strict=True):
        loss = "-" if one.loss is None else f"{one.loss:.4f}"
        assert row.split()[:3] == [name, str(one.tokens), loss]
    assert total.split() == [
        *("total", "(5", "documents)", str(expected.total.tokens)),
        *(f"{value:.4f}" for value in (expected.total.loss, expected.total.perplexity)),
        *(f"{value:.4f}" for value in (expected.total.bits_per_byte, expected.total.bits_per_character)),
    ]
    content = json.loads((tmp_path / "scores.json").read_text())
    assert [(one["line"], one["tokens"]) for one in content["documents"]] == [
        *((None, 39), (None, 2), (1, 4), (3, 0), (4, 29))
    ]
    assert content["documents"][3]["loss"] is None
    assert content["total"]["loss"] == pytest.approx(expected.total.loss, rel=1e-6)


def test_scores_that_cannot_be_written_are_printed(tmp_path, capsys):
    jaxmodels.save(transformer(), tmp_path / "model")
    VOCABULARY.save(tmp_path / "model" / "vocabulary.json")
    (tmp_path / "a.txt").write_text(TEXT)
    with full_disk(), pytest.raises(OSError, match=r"scores\.json"):
        scores(tmp_path / "model", "--text", tmp_path / "a.txt", "--stride", 5, "--json", tmp_path / "scores.json")
    assert len(capsys.readouterr().out.splitlines()) == 3  # names, the text, the total


def test_an_infinite_loss_is_null_in_json(tmp_path, capsys):
    model = transformer()
    bias = np.zeros(len(VOCABULARY), np.float32)
    bias[VOCABULARY.encode(TEXT[3])[0]] = -np.inf
    model.generator.projection.bias = nnx.Param(bias)  # a NumPy array, which Orbax notes
    jaxmodels.save(model, tmp_path / "model")
    VOCABULARY.save(tmp_path / "model" / "vocabulary.json")
    (tmp_path / "a.txt").write_text(TEXT)
    scores(tmp_path / "model", "--text", tmp_path / "a.txt", "--stride", 5, "--json", tmp_path / "scores.json")
    assert "inf" in capsys.readouterr().out

    def constant(name):
        raise AssertionError(f"{name} is not JSON")

    content = json.loads((tmp_path / "scores.json").read_text(), parse_constant=constant)
    assert content["total"]["loss"] is content["total"]["bits_per_byte"] is None


def test_a_long_jsonl_file_has_one_row(tmp_path, capsys):
    jaxmodels.save(transformer(), tmp_path / "model")
    VOCABULARY.save(tmp_path / "model" / "vocabulary.json")
    (tmp_path / "many.jsonl").write_text("".join(json.dumps({"t": TEXT[i : i + 7]}) + "\n" for i in range(21)))
    scores(tmp_path / "model", "--text", tmp_path / "many.jsonl", "--jsonl-field", "t", "--stride", 5)
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 3
    assert rows[1].startswith(f"{tmp_path / 'many.jsonl'} (21 documents)  ")
    assert rows[1].split()[-4:] == rows[2].split()[-4:]


def test_a_hugging_face_folder_is_scored_in_its_own_length(tmp_path, capsys):
    folder = hugging_face_folder(tmp_path / "published", dtype="float16")
    (tmp_path / "text").write_text(TEXT[:400])
    found = []
    for flags in ([], ["--seq-len", 60, "--stride", 30], ["--bos"]):
        scores(folder, "--text", tmp_path / "text", *flags)
        found.append(capsys.readouterr().out.splitlines()[-1].split()[-5:])
    ids = byte_level_tokenizer().encode(TEXT[:400]).ids
    assert [int(row[0]) for row in found] == [len(ids) - 1, len(ids) - 1, len(ids)]
    expected = score(jaxmodels.load(folder), [ids], max_length=61, stride=30).total
    assert float(found[0][1]) == float(found[1][1]) == pytest.approx(expected.loss, abs=2e-4)


def test_a_run_is_scored_in_strides(make_run, tmp_path, capsys, monkeypatch):
    model = transformer()
    folder = make_run(rope.Rope(rope.Config(seq_len=S)), VOCABULARY, "0" * 64, model)
    jaxmodels.save(model, tmp_path / "model")
    monkeypatch.setattr(evaluate, "open_source", lambda *_, **__: opened)
    opened = dataclasses.replace(
        open_source(tmp_path / "model"), kind="run", folder=folder, companions=Companions.of(folder)
    )
    (tmp_path / "text").write_text(TEXT[:40])
    scores(folder, "--text", tmp_path / "text", "--seq-len", S - 1, "--stride", 5)
    loss = float(capsys.readouterr().out.splitlines()[1].split()[2])
    expected = score(model, [VOCABULARY.encode(TEXT[:40])], max_length=S, stride=5).total
    assert loss == pytest.approx(expected.loss, abs=2e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text", "c.jsonl"], "c.jsonl.*--jsonl-field"),
        (["--text", "c.jsonl", "--jsonl-field", "words"], "c.jsonl:1 .*'words'.*'id', 'text'"),
        (["--text", "bad.jsonl", "--jsonl-field", "text"], "bad.jsonl:2 "),
        (["--text", "half.jsonl", "--jsonl-field", "text"], "half.jsonl:2: .*not Unicode"),
        (["--text", "c.JSONL"], "c.JSONL.*--jsonl-field"),
        (["--text", "c.JSONL", "--jsonl-field", "words"], "c.JSONL:1 .*'words'.*'id', 'text'"),
        (["--text", "a.txt", "b.txt", "--jsonl-field", "text"], "--jsonl-field text .*a.txt, b.txt"),
        (["--text", "a.txt", "none.txt"], "none.txt"),
        (["--text", "a.txt", "--bos"], "--bos"),
        (["--text", "a.txt", "--stride", "0"], "stride=0"),
        (["--text", "a.txt", "--stride", "12", "--seq-len", "11"], "stride=12 .*11"),
        (["--stride", "3"], "--text"),
    ],
)
def test_bad_documents_are_refused(flags, message, documents, tmp_path, monkeypatch):
    jaxmodels.save(transformer(), tmp_path / "model")
    VOCABULARY.save(tmp_path / "model" / "vocabulary.json")
    (tmp_path / "bad.jsonl").write_text('{"text": "abc"}\n{"text": 3}\n')
    (tmp_path / "half.jsonl").write_text('{"text": "abc"}\n{"text": "\\ud800"}\n')
    (tmp_path / "c.JSONL").write_text((tmp_path / "c.jsonl").read_text())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        scores("model", *flags)


@pytest.fixture
def saved(tmp_path) -> Path:
    """A model with its vocabulary."""
    jaxmodels.save(transformer(), tmp_path / "model")
    VOCABULARY.save(tmp_path / "model" / "vocabulary.json")
    return tmp_path / "model"


@pytest.mark.parametrize("flags", [[], ["--text", "a.txt"], ["--text", "a.txt", "--seq-len", "8"], ["--seq-len", "8"]])
def test_a_folder_that_does_not_exist_is_named_in_one_line(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)
    assert evaluate.main(["nowhere", *flags]) == 2
    assert re.fullmatch(r"python -m train\.evaluate: nowhere is not a folder[^\n]*\n", capsys.readouterr().err)


@pytest.mark.parametrize("documents", [[], ["--stride", 5]])
def test_a_large_text_is_read_in_pieces(documents, saved, tmp_path, capsys, monkeypatch):
    (tmp_path / "text").write_text("\ufeff" + TEXT[: 20 * S + 1])
    shown = []
    for whole in (2**22, 100):
        monkeypatch.setattr("jaxmodels.text.sources.WHOLE", whole)
        monkeypatch.setattr(evaluate, "SOME", 3)
        scores(saved, "--text", tmp_path / "text", "--seq-len", S, *documents)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert f" {20 * S} " in shown[0]


def test_jsonl_needs_a_field_for_sequences_too(saved, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": TEXT}))
    with pytest.raises(ValueError, match=r"a\.jsonl.*--jsonl-field"):
        scores(saved, "--text", tmp_path / "a.jsonl", "--seq-len", S)
