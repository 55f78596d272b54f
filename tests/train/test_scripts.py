"""What is particular to the scripts other than rope."""

import re

import jax
import numpy as np
import pytest

from tests.train_common import TEXT, TINY
from train import metrics, rope_value, synthesizer
from train.experiment import main
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


def test_training_examples_differ_and_are_the_same_again():
    task, again, other = (rope_value.Config(seed=seed, seq_len=40).task() for seed in (0, 0, 1))
    drawn = [task.train[i]["tokens"].tobytes() for i in range(20)]
    assert len(set(drawn)) == 20
    assert drawn == [again.train[i]["tokens"].tobytes() for i in range(20)]
    assert drawn[0] != other.train[0]["tokens"].tobytes()
    assert task.sha256 == other.sha256 != rope_value.Config(seq_len=40, digits=4).task().sha256


class Oracle:
    """A language model that has learnt the task, for the interface of `generate`."""

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


@pytest.fixture
def tiny(compile_cache):
    return [*map(str, TINY), "--no-tensorboard", "--compile-cache", str(compile_cache), "--steps", "3"]


def test_rope_value_scores_its_answers(tiny, tmp_path, capsys):
    assert main(rope_value.Config, "python -m train.rope_value", [*tiny, "--out", str(tmp_path / "run")]) == 0
    assert "0 of 64 answers right, such as" in capsys.readouterr().out
    assert metrics.read(tmp_path / "run")[-1]["score"] == 0


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
    with pytest.raises(ValueError, match=r"was trained with .*d_ff=13, not "):
        synthesizer.main([*arguments, "--d-ff", "17"])
