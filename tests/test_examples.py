"""The worked example of docs/porting.md: GPT-2 of transformers against a port with other names."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "examples" / "gpt2.py"


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("gpt2", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_suggest_finds_all_names_and_marks_the_order_of_fused_projections_as_ambiguous(example, capsys):
    assert example.main(["--suggest"]) == 0
    output = capsys.readouterr().out
    assert "no counterpart" not in output
    assert "'model.transformer.h.*.mlp.c_fc': 'blocks.*.up'" in output
    assert output.count("ambiguous") == 1


def test_the_bug_is_located_and_the_fixed_port_agrees(example, capsys):
    assert example.main(["--bug"]) == 1
    output = capsys.readouterr().out
    assert "first divergence: model.transformer.h.0.ln_1" in output
    assert "epsilon: Flax has 1e-06, PyTorch 1e-05" in output
    assert example.main([]) == 0
