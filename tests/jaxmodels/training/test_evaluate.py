"""`python -m train.evaluate`: models of every system, and runs on their held-out data."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import jaxmodels
from jaxmodels.feedback import AutoregressiveModel, FeedbackTransformer, FeedbackTransformerKV
from jaxmodels.neox import NeoX, NeoXConfig, quantize
from jaxmodels.retro import NearestNeighborEncoder, RetroModel
from jaxmodels.text import CharVocabulary
from jaxmodels.training import evaluate, run
from jaxmodels.training.data import Windows, stack
from jaxmodels.training.run import write_about
from jaxmodels.training.step import token_losses
from jaxmodels.training.tokenize import open_tokens, tokenize
from jaxmodels.transformer import AutoregressiveTransformer
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


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """Makes a run's folder, whose latest model is the given one."""

    def make(experiment, vocabulary, sha256: str, model) -> Path:
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        vocabulary.save(tmp_path / "run" / "vocabulary.json")
        write_about(tmp_path / "run", experiment, sha256)
        monkeypatch.setattr(run, "latest_model", lambda folder, mesh: (model, 1))
        return tmp_path / "run"

    return make


def test_a_run_is_evaluated_in_its_own_vocabulary_and_on_its_own_text(make_run, tmp_path, capsys):
    text, model = tmp_path / "sea.txt", transformer()
    text.write_text(TEXT)
    tokens = open_tokens(str(text), VOCABULARY)
    folder = make_run(rope.Rope(rope.Config(text=str(text), seq_len=S)), VOCABULARY, tokens.sha256, model)
    line, loss = evaluated(capsys, folder)
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


@pytest.mark.parametrize("flag", ["seq-len", "batch-size"])
@pytest.mark.parametrize("value", [0, -3])
def test_a_size_below_1_is_refused_before_any_work(flag, value):
    with pytest.raises(ValueError, match=f"^{flag.replace('-', '_')}={value} .*1"):
        scores("nowhere", f"--{flag}={value}")
