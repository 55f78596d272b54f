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


def test_the_names_are_suggested_but_for_the_order_of_a_fused_projection(example, capsys):
    assert example.main(["--suggest"]) == 0
    said = capsys.readouterr().out
    assert "no counterpart" not in said
    assert "'model.transformer.h.*.mlp.c_fc': 'blocks.*.up'" in said
    assert said.count("ambiguous") == 2


def test_the_port_as_it_was_is_found_out_and_the_fixed_one_agrees(example, capsys):
    assert example.main(["--bug"]) == 1
    said = capsys.readouterr().out
    assert "first divergence: model.transformer.h.0.ln_1" in said
    assert "epsilon: Flax has 1e-06, PyTorch 1e-05" in said
    assert example.main([]) == 0
