"""The command parity.mutations: its sample, its table, its exit code."""

import re

import numpy as np
import pytest

from parity.mutation import score
from parity.mutation.mutate import Mutant
from parity.mutation.operators import OPERATORS


def test_planted_errors_are_found_and_named_and_the_unbroken_case_raises_no_alarm(capsys):
    assert score.main(["synthesizer.dense_layer", "--count", "5", "--seeds", "2"]) == 0
    text = capsys.readouterr().out
    assert "- found: 5 of 5 (100 %)" in text
    assert "- false alarms: 0 in 1 unbroken cases at 2 seeds each" in text
    assert text.count("| synthesizer.dense_layer |") == 5
    assert float(re.search(r"smallest: (\S+) × noise", text)[1]) > 1e3
    assert score.main(["synthesizer.dense_layer", "--count", "0", "--seeds", "1"]) == 0
    alone = capsys.readouterr().out
    assert float(re.search(r"largest in float64: (\S+) × noise", alone)[1]) < 8
    assert "mutants" not in alone


@pytest.mark.slow
def test_an_interrupted_run_continues_from_its_state(tmp_path, capsys, monkeypatch):
    file = tmp_path / "state.jsonl"
    command = ["synthesizer.dense_layer", "--seeds", "1", "--state", str(file)]
    assert score.main([*command, "--count", "2"]) == 0
    assert score.main([*command, "--count", "3"]) == 0
    text = capsys.readouterr().out.rpartition("# Planted")[2]
    monkeypatch.setattr(score.Subject, "judge", lambda *_: pytest.fail("judged again"))
    monkeypatch.setattr(score, "unbroken", lambda *_: pytest.fail("judged again"))
    assert score.main([*command, "--count", "3"]) == 0
    assert capsys.readouterr().out.rpartition("# Planted")[2] == text
    file.write_text(file.read_text() + "{}\n")
    assert score.main(command) == 2
    assert f"{file}, line 5" in capsys.readouterr().err


def test_a_name_that_matches_no_case_is_an_error(capsys):
    assert score.main(["nothing"]) == 2
    error = capsys.readouterr().err
    assert "nothing" in error
    assert "rope.attention" in error


@pytest.mark.parametrize("option", ["--count -1", "--cases 0", "--seed -1", "--seeds -1"])
def test_a_number_out_of_range_is_an_error(option, capsys):
    assert score.main(["synthesizer.dense_layer", *option.split()]) == 2
    assert option in capsys.readouterr().err


def test_the_sample_is_even_over_systems_and_follows_the_seed():
    def mutant(system, operator):
        return Mutant(system, (), "", OPERATORS[operator])

    systems = {s: [mutant(s, o) for o in ("factor", "skipped", "missing bias") for _ in range(4)] for s in "ab"}
    draws = [list(score.drawn(systems, np.random.default_rng(seed))) for seed in (0, 0, 1)]
    assert [m.case for m in draws[0][:4]] == ["a", "b", "a", "b"]
    assert len({m.operator.name for m in draws[0][:3]}) == 3
    assert draws[0] == draws[1]
    assert len(draws[0]) == 24


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_every_operator_has_a_description(name):
    assert OPERATORS[name].about


@pytest.mark.parametrize(
    ("stack", "path", "at"),
    [
        (1, "layers.2.ffn.lin", True),
        (1, "layers.2.ffn", False),
        (None, "layers.2.ffn.lin", False),
        (None, "layers.0.ffn.lin", True),
        (1, "", False),
    ],
)
def test_a_mistake_in_a_stack_is_in_each_of_its_layers(stack, path, at):
    mutant = Mutant("case", (), "layers.0.ffn.lin", OPERATORS["factor"], stack)
    assert mutant.at(path) is at
