"""The worked example of docs/parity/check.md: GPT-2 of transformers against a port with other names."""

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


@pytest.mark.slow
def test_suggest_finds_all_names(example, capsys):
    assert example.main(["--suggest"]) == 0
    output = capsys.readouterr().out
    assert "no counterpart" not in output
    assert "ambiguous" not in output
    assert "'model.transformer.h.*.mlp.c_fc': 'blocks.*.up'" in output
    assert "'model.transformer.h.*.attn.c_attn': 'blocks.*.attention.qkv'" in output


@pytest.mark.slow
def test_each_bug_is_located_with_its_cause(example, capsys):
    assert example.main(["--bug", "norm"]) == 1
    output = capsys.readouterr().out
    assert "model.transformer.h.0.ln_1" in output.partition("first divergence")[2].splitlines()[0]
    assert "epsilon: Flax has 1e-06, PyTorch 1e-05" in output.replace("\n", " ").replace("           ", " ")
    assert example.main(["--bug", "heads"]) == 1
    first = capsys.readouterr().out.partition("first divergence")[2].splitlines()
    assert "model.transformer.h.0.attn" in first[0]
    assert "head" in " ".join(first[:3])


@pytest.mark.slow
def test_the_fixed_port_agrees(example):
    assert example.main([]) == 0
