"""Scripts other than rope: what differs from it."""

import dataclasses
import json
import re

import chex
import jax
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers

import jaxmodels
from jaxmodels.feedback.parallel import ApproximateWarning, from_parallel
from jaxmodels.generate.command import default_prompt
from jaxmodels.neox import NeoX, NeoXConfig, quantize
from jaxmodels.sharding import make_mesh
from jaxmodels.text import ByteVocabulary, CharVocabulary
from jaxmodels.training import metrics
from jaxmodels.training.checkpoints import latest_model
from jaxmodels.training.commands import evaluate, sample
from jaxmodels.training.data import without_padding
from jaxmodels.training.plan import flops
from jaxmodels.training.runs.folder import saved_experiment, write_about
from jaxmodels.training.script import main
from jaxmodels.training.tokenize import tokenize
from jaxmodels.transformer import AutoregressiveTransformer
from jaxmodels.weights.names import flat_arrays
from tests.train_common import TEXT, TINY, without_warmup
from train import feedback, feedback_kv, neox, retro, rope, rope_value, synthesizer
from train.rope_value import VOCABULARY, answer, problem, question, sequence


def test_a_problem_is_written_as_the_original_has_it():
    assert problem(18, 5) == "?x=18+5; 8e0+5e0+0e0==13e0 1e1+0e1+1e1==2e1 x==23\n"
    assert problem(9, 4) == "?x=9+4; 9e0+4e0+0e0==13e0 0e1+0e1+1e1==1e1 x==13\n"
    assert VOCABULARY.characters == "0123456789xe =\n?+;"


def test_sequences_are_problems_and_their_sums_are_right():
    text = VOCABULARY.decode(sequence(3, 499, np.random.default_rng(0))["tokens"])
    assert len(text) == 500
    found = [(int(a) + int(b), int(total)) for a, b, total in re.findall(r"\?x=(\d+)\+(\d+);.* x==(\d+)\n", text)]
    assert len(found) > 5
    assert all(total == right for total, right in found)
    lengths = {len(str(n)) for n in re.findall(r"=(\d+)\+", text)}
    assert lengths == {1, 2, 3}


def experiment(**fields: object) -> rope_value.RopeValue:
    return rope_value.RopeValue(rope_value.Config(**fields))


def test_numbers_of_more_than_64_bits_are_refused():
    assert len(rope_value.draw(18, np.random.default_rng(0))) == 2
    with pytest.raises(ValueError, match=r"^digits=19 must be at most 18$"):
        experiment(digits=19)


def test_training_examples_differ_and_are_the_same_again():
    task, again, other = (experiment(seed=seed, seq_len=40).task() for seed in (0, 0, 1))
    drawn = [task.train[i]["tokens"].tobytes() for i in range(20)]
    assert len(set(drawn)) == 20
    assert drawn == [again.train[i]["tokens"].tobytes() for i in range(20)]
    assert drawn[0] != other.train[0]["tokens"].tobytes()
    assert task.sha256 == other.sha256 != experiment(seq_len=40, digits=4).task().sha256


class Oracle:
    """Stands for a language model that has learned the task."""

    sequence_axis = 0


def test_answers_of_prompts_of_different_lengths_end_with_their_line(monkeypatch):
    pairs = [(1, 2), (345, 678), (20, 3)]

    def generate(model, ids, n, *, stop_tokens, start):
        prompts = [VOCABULARY.decode(np.asarray(ids)[first:, i]) for i, first in enumerate(start)]
        assert prompts == [question(*pair) for pair in pairs]
        written = [problem(*pair).partition(";")[2].ljust(n, "\n")[:n] for pair in pairs]
        assert stop_tokens == (VOCABULARY.characters.index("\n"),)
        return jax.numpy.asarray(np.stack([VOCABULARY.encode(text) for text in written], axis=1))

    monkeypatch.setattr(rope_value, "generate", generate)
    found = answer(Oracle(), pairs, 100)
    assert [text.rpartition("x==")[2] for text in found] == ["3", "1023", "23"]


def test_answering_stops_when_interrupted(monkeypatch):
    def generate(model, ids, n, **others):
        return jax.numpy.zeros((n, ids.shape[1]), int)

    monkeypatch.setattr(rope_value, "generate", generate)
    interrupted = iter([False, False, True])
    shown, numbers = experiment().report(Oracle(), None, lambda: next(interrupted))
    assert shown.startswith("0 of 32 answers right, such as\n?x=")
    assert numbers == {}
    assert experiment().report(Oracle(), None, lambda: True)[1] == {}
    assert experiment().report(Oracle(), None, lambda: False)[1] == {"score": 0}


@pytest.fixture
def tiny(compile_cache):
    return [*map(str, TINY), "--no-tensorboard", "--compile-cache", str(compile_cache), "--steps", "3"]


@pytest.mark.slow
def test_rope_value_scores_its_answers(tiny, tmp_path, capsys):
    assert (
        main(
            rope_value.RopeValue, "python -m train.rope_value", [*without_warmup(tiny), "--out", str(tmp_path / "run")]
        )
        == 0
    )
    assert "0 of 64 answers right, such as" in capsys.readouterr().out
    assert metrics.read(tmp_path / "run")[-1]["score"] == 0
    assert sample.main([str(tmp_path / "run"), "--length", "3"]) == 0  # as the run's last line says
    assert re.fullmatch(r"\n.{3}\n", capsys.readouterr().out, re.S)


def test_problems_of_a_saved_run_are_those_that_it_was_trained_with(tmp_path):
    trained = experiment(seq_len=11, digits=3)
    sha256 = trained.task().sha256
    write_about(tmp_path, trained, sha256, {})
    longer = experiment(seq_len=17, digits=3)  # as by `evaluate --seq-len`
    assert len(longer.held_out(tmp_path, VOCABULARY, sha256)[0]["tokens"]) == 18
    write_about(tmp_path, experiment(seq_len=11, digits=7), sha256, {})
    with pytest.raises(ValueError, match=f"digits=7 has changed since {tmp_path} was trained"):
        saved_experiment(tmp_path).held_out(tmp_path, VOCABULARY, sha256)


def test_a_tokenizer_with_an_absurd_id_is_refused_before_a_model_is_made(tmp_path):
    text, folder = tmp_path / "a.txt", tmp_path / "tokens"
    text.write_text("b " * 300)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "z": 2**20 + 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenize(str(text), folder, tokenizer=tmp_path / "tokenizer.json")
    for experiment in (rope.Rope(rope.Config(text=str(folder))), retro.Retro(retro.Config(text=str(folder)))):
        with pytest.raises(ValueError, match=f"text='{folder}' has .* 1,048,578 tokens; at most 1,048,576"):
            experiment.task()


def test_the_default_prompt_is_in_the_vocabulary():
    assert default_prompt(CharVocabulary("\n Teh")) == "The "
    assert default_prompt(VOCABULARY) == "\n"
    assert default_prompt(CharVocabulary("äb")) == "ä"
    assert default_prompt(ByteVocabulary()) == "The "


@pytest.mark.slow
def test_synthesizers_side_by_side(tiny, tmp_path, capsys, monkeypatch):
    (tmp_path / "sea.txt").write_text(TEXT)
    monkeypatch.setattr(synthesizer, "KINDS", ("fixed_random", "random+vanilla"))
    arguments = [*tiny, "--text", str(tmp_path / "sea.txt"), "--out", str(tmp_path / "runs")]
    assert synthesizer.main(arguments) == 0
    shown = capsys.readouterr().out
    again = (synthesizer.main(arguments), capsys.readouterr().out)[1]
    losses = {kind: metrics.read(tmp_path / "runs" / kind)[-1]["validation_loss"] for kind in synthesizer.KINDS}
    for out in (shown, again):
        for kind, loss in losses.items():
            assert re.search(rf"^ {re.escape(kind)} +[\d,]+ +{loss:.3f} *$", out, re.M)
        assert re.search(r"^ character 4-gram \(Witten-Bell\) +0\.\d+ *$", out, re.M)
    with pytest.raises(ValueError, match=r"d_ff=13.*d_ff=17"):
        synthesizer.main([*arguments, "--d-ff", "17"])


@pytest.mark.slow
def test_feedback_starts_from_a_parallel_transformer(tmp_path, monkeypatch):
    vocabulary = CharVocabulary("abc\n ")
    vocabulary.save(tmp_path / "vocabulary.json")
    parallel = AutoregressiveTransformer(len(vocabulary), 8, 2, 11, 1, "relative", rngs=nnx.Rngs(0))
    monkeypatch.setattr(feedback, "latest_model", lambda run: (parallel, 1))
    config = feedback.Config(from_parallel=str(tmp_path), d_model=8, heads=2, d_ff=11, n_layers=1, memory=3)
    experiment = feedback.Feedback(config)
    program = experiment.program(len(vocabulary), make_mesh())
    begun = program.model(experiment.initial(program, vocabulary))
    assert begun.transformer.memory == 3
    chex.assert_trees_all_equal(flat_arrays(begun), flat_arrays(from_parallel(parallel)))
    with pytest.raises(ValueError, match=f"from_parallel='{tmp_path}'"):
        experiment.initial(program, CharVocabulary("abcd "))
    shared = feedback_kv.FeedbackKV(feedback_kv.Config(**dataclasses.asdict(config)))
    with pytest.warns(ApproximateWarning):
        shared.initial(shared.program(len(vocabulary), make_mesh()), vocabulary)
    other = feedback.Feedback(dataclasses.replace(config, d_ff=12))
    with pytest.raises(ValueError, match=r"layer1\.bias .*\(11,\).*\(12,\)"):
        other.initial(other.program(len(vocabulary), make_mesh()), vocabulary)


def test_a_curriculum_doubles_its_lengths():
    grows = feedback_kv.FeedbackKV(feedback_kv.Config(seq_len=50, start_len=7, double_every=3))
    assert [grows.length_at(step) for step in range(10)] == [7, 7, 7, 14, 14, 14, 28, 28, 28, 50]
    assert {feedback.Feedback(feedback.Config(seq_len=50)).length_at(step) for step in (0, 10_000)} == {50}
    assert grows.length_at(10**9) == 50
    with pytest.raises(ValueError, match=r"start_len=51 .*seq_len=50"):
        feedback.Config(seq_len=50, start_len=51)


def saved_neox(folder, n_vocab: int = 61, **others):
    config = NeoXConfig(
        n_vocab=n_vocab, n_hidden=12, n_layers=2, n_heads=3, n_ff=17, rope_percentage=0.5, max_len=32, **others
    )
    model = NeoX(config, stacked=False, rngs=nnx.Rngs(0))
    jaxmodels.save(model, folder)
    return model


@pytest.mark.slow
def test_neox_tunes_only_biases(tiny, tmp_path):
    (tmp_path / "sea.txt").write_text(TEXT)
    tokenize(str(tmp_path / "sea.txt"), tmp_path / "tokens")
    before = flat_arrays(saved_neox(tmp_path / "model").stacked())
    flags = ["--preset=finetune", "--tune=biases", "--checkpoint", str(tmp_path / "model"), "--text"]
    sizes = ("--d-model=", "--heads=", "--d-ff=", "--n-layers=")  # those of the checkpoint
    kept = [flag for flag in without_warmup(tiny) if not flag.startswith(sizes)]
    arguments = [*kept, *flags, str(tmp_path / "tokens"), "--out", str(tmp_path / "run")]
    assert main(neox.Neox, "python -m train.neox", arguments) == 0
    after = flat_arrays(latest_model(tmp_path / "run")[0])
    changed = {".".join(map(str, path)) for path in before if (before[path] != after[path]).any()}
    names = ("attention.output", "attention.qkv_lin", "ffn.dense_h_h4")
    assert changed == {f"layers.{name}.bias" for name in names}


@pytest.mark.slow
def test_neox_refuses_what_it_cannot_tune(tmp_path):
    sea = tmp_path / "sea.txt"
    sea.write_text(TEXT)
    with pytest.raises(ValueError, match=r"tune='biases'.*--checkpoint"):
        neox.Neox(neox.Config(text=str(sea), tune="biases")).task()
    model = saved_neox(tmp_path / "small", n_vocab=5)
    experiment = neox.Neox(neox.Config(text=str(sea), checkpoint=str(tmp_path / "small")))
    with pytest.raises(ValueError, match="tokenizer"):
        experiment.task()
    tokenize(str(sea), tmp_path / "tokens")
    experiment = neox.Neox(neox.Config(text=str(tmp_path / "tokens"), checkpoint=str(tmp_path / "small")))
    with pytest.raises(ValueError, match=r"text='.*tokens' .*\b27; checkpoint='.*' .*\b5\b"):
        experiment.task()
    jaxmodels.save(quantize(model), tmp_path / "int8")
    with pytest.raises(ValueError, match=r"checkpoint='.*int8'"):
        neox.Neox(neox.Config(checkpoint=str(tmp_path / "int8"))).model(5)


@pytest.mark.slow
def test_documents_of_a_file_are_trained_on_apart(tmp_path):
    lines = [{"body": "a" * 9}, {"body": "b" * 30}, {"body": "c" * 17}, {"body": "d" * 12}]
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = rope.Config(text=str(file), text_field="body", seq_len=11, within_documents=True)
    task = rope.Rope(config).task()
    assert task.vocabulary.characters == "\nabcd"
    seen = {task.vocabulary.decode(task.train[i]["tokens"]) for i in range(200)}
    assert all(len(set(text) - {"\n"}) == 1 for text in seen)
    found = {task.vocabulary.decode(without_padding(task.train[i])) for i in range(200)}
    assert "a" * 9 + "\n\n" in found  # shorter than a sequence
    assert any(text.endswith("b\n\n") for text in found)
    assert "6 sequences within documents, 89% of their places filled" in task.about
    held_out = rope.Rope(config).held_out(tmp_path, task.vocabulary, task.sha256)
    assert (
        task.vocabulary.decode(np.concatenate([without_padding(held_out[0]), held_out[1]["tokens"][1:2]]))
        == "d" * 12 + "\n"
    )
    with pytest.raises(ValueError, match=r"no column|has 'text'=None"):
        rope.Rope(rope.Config(text=str(file))).task()
    with pytest.raises(ValueError, match="within_documents: text='python_docs' is one text"):
        rope.Rope(rope.Config(within_documents=True)).task()
    with pytest.raises(ValueError, match="within_documents: RopeValue"):
        rope_value.RopeValue(rope_value.Config(within_documents=True))


def test_padding_does_not_change_the_work_of_a_step():
    counts = []
    for within in (False, True):
        made = rope.Rope(rope.Config(within_documents=within, d_model=30, heads=3, d_ff=13, n_layers=1, seq_len=11))
        counts.append(flops.of_step(made.program(7, make_mesh()), made.abstract_batch()))
    assert counts[0] == counts[1] > 0


@pytest.mark.slow
def test_a_run_within_documents_trains_resumes_and_is_evaluated(tiny, tmp_path, capsys):
    file, run = tmp_path / "documents.jsonl", tmp_path / "run"
    file.write_text("".join(json.dumps({"text": TEXT[i : i + 5 + i % 31]}) + "\n" for i in range(0, 2000, 17)))
    assert main(rope.Rope, "rope", [*tiny, "--text", str(file), "--within-documents", "--out", str(run)]) == 0
    assert main(rope.Rope, "rope", ["--resume", str(run), "--steps", "5"]) == 0
    capsys.readouterr()
    assert evaluate.main([str(run)]) == 0
    (loss,) = re.findall(r"^ +loss +([\d.]+)", capsys.readouterr().out, re.M)
    assert float(loss) == pytest.approx(metrics.read(run)[-1]["validation_loss"], abs=1e-4)
