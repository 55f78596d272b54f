"""`python -m jaxmodels.convert` over NeoX checkpoints."""

import io
import json
import re
import subprocess
import sys

import pytest
import torch

import jaxmodels
from jaxmodels.convert.command import main
from jaxmodels.convert.flax import open_flax
from jaxmodels.convert.neox import load_neox
from jaxmodels.convert.neox.read import open_neox
from jaxmodels.io import manifest
from jaxmodels.weights.lazy import read
from jaxmodels.weights.names import as_tensor
from tests.jaxmodels.convert.neox.test_read import assert_holds
from tests.jaxmodels.convert.originals import CONFIG, layer_file, write


def command(*arguments) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def source(tmp_path):
    state = write(tmp_path / "source", 2)
    return tmp_path / "source", state


def test_round_through_every_format(source, tmp_path, capsys):
    folder, state = source
    route = [("hf",), ("flax",), ("neox", "--model-parallel", 4), ("flax",), ("hf",), ("neox",)]
    for i, (to, *more) in enumerate(route):
        target = tmp_path / f"{i}.{to}"
        assert command("neox", folder, target, "--to", to, *more) == 0
        assert f"{target}: NeoX as {to}, 309,228 parameters, float16" in capsys.readouterr().out
        assert command("verify", tmp_path / "source", target) == 0
        assert "all 40 tensors are equal, 309,228 values bit for bit" in capsys.readouterr().out
        folder = target
    assert_holds(load_neox(folder), state)
    assert_holds(jaxmodels.load(tmp_path / "1.flax"), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_dtype_is_kept(tmp_path, dtype):
    state = write(tmp_path / "source", 3, dtype=dtype)
    assert command("neox", tmp_path / "source", tmp_path / "flax", "--to", "flax") == 0
    assert command("neox", tmp_path / "flax", tmp_path / "neox", "--to", "neox", "--model-parallel", 1) == 0
    for name, tensor in open_neox(tmp_path / "neox").tensors.items():
        assert torch.equal(as_tensor(read(tensor)), state[name]), name
    assert command("verify", tmp_path / "source", tmp_path / "neox") == 0


def test_a_checkpoint_that_orbax_wrote(source, tmp_path):
    folder, state = source
    jaxmodels.save(load_neox(folder), tmp_path / "orbax")
    assert (tmp_path / "orbax" / "params").is_dir()
    assert command("neox", tmp_path / "orbax", tmp_path / "back", "--to", "neox", "--model-parallel", 3) == 0
    assert_holds(load_neox(tmp_path / "back"), state)


def test_dtype_and_vocabulary(source, tmp_path, capsys):
    folder, state = source
    out = tmp_path / "out"
    assert command("neox", folder, out, "--to", "flax", "--dtype", "bfloat16", "--vocab", 79) == 0
    model = jaxmodels.load(out)
    assert model.settings.n_vocab == 79
    expected = {name: tensor.bfloat16() for name, tensor in state.items()}
    for name in ("embedding.emb.weight", "readout.linear.weight"):
        expected[name] = expected[name][:79]
    assert_holds(model, expected)
    assert command("verify", folder, out) == 1
    assert "n_vocab: 84 and 79" in capsys.readouterr().out
    assert command("verify", folder, out, "--vocab", 79) == 0
    assert command("neox", folder, tmp_path / "more", "--to", "flax", "--vocab", 85) == 2
    assert re.search(r"n_vocab=85\b.*\b84\b", capsys.readouterr().err)


def test_verify_counts_what_differs(source, tmp_path, capsys):
    folder, _ = source
    assert command("neox", folder, tmp_path / "out", "--to", "neox") == 0
    file = next((tmp_path / "out").glob("*/layer_03-model_01-*"))
    tensors = torch.load(file)
    tensors["attention.dense.weight"][5, 7] += 0.5
    tensors["attention.dense.weight"][6, 7] += 0.25
    tensors["attention.query_key_value.bias"][3] = float("nan")
    torch.save(tensors, file)
    capsys.readouterr()
    assert command("verify", folder, tmp_path / "out") == 1
    out = capsys.readouterr().out
    assert "2 of 40 tensors differ:" in out
    assert "layers.1.attention.output.weight: 2 of 14,400 values differ, by up to 0.5" in out
    assert "layers.1.attention.qkv_lin.bias: 1 of 360 values differ, by up to nan" in out


def test_inspect_says_what_it_is_before_anything_is_converted(source, capsys):
    folder, _ = source
    assert command("inspect", folder) == 0
    out = capsys.readouterr().out
    for said in (
        "GPT-NeoX shards (layer files of 2 model-parallel ranks in global_step143), 309,228 parameters, float16",
        "activation         gelu\n",
        "n_heads            12\n",
        "n_ff               156\n",
        "parallel_residual  True\n",
        "largest layer      0.2 MB",
        "note: configuration from model.yml, rest.yml",
    ):
        assert said in out


def test_a_configuration_for_shards_without_one(tmp_path, capsys):
    write(tmp_path / "source", yaml=False)
    assert command("inspect", tmp_path / "source") == 2
    assert "n_heads" in capsys.readouterr().err
    said = {"n_vocab": 84, "n_hidden": 120, "n_layers": 3, "n_heads": 12, "n_ff": 156}
    config = json.dumps(said | {"rope_percentage": 0.4, "rope_base": 9000.0, "max_len": 77})
    assert command("neox", tmp_path / "source", tmp_path / "out", "--to", "flax", "--config", config) == 0
    assert jaxmodels.load(tmp_path / "out").settings == CONFIG
    assert command("inspect", tmp_path / "source", "--config", "pythia_70m") == 2
    assert re.search(r"n_layers .*\b3\b.*\b6\b", capsys.readouterr().err)
    assert command("inspect", tmp_path / "source", "--config", '{"color": 1}') == 2
    assert "color" in capsys.readouterr().err
    assert command("inspect", tmp_path / "out", "--config", config) == 2
    assert "(--config) is for GPT-NeoX shards" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["flax", "hf", "neox"])
def test_a_bad_source_or_target_is_one_line_and_nothing_is_written(source, tmp_path, capsys, to):
    folder, _ = source
    out = tmp_path / "out"
    assert command("neox", tmp_path / "nowhere", out, "--to", to) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("python -m jaxmodels.convert neox: ")
    assert f"{tmp_path / 'nowhere'} " in shown
    assert len(shown.splitlines()) == 1
    assert command("neox", folder, folder, "--to", to) == 2
    assert str(folder) in capsys.readouterr().err
    layer_file(folder, 7, 1).unlink()
    assert command("neox", folder, out, "--to", to) == 2
    assert "layer_07-model_01-model_states.pt" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("to", ["flax", "hf", "neox"])
def test_the_source_and_what_lies_around_it_are_never_overwritten(source, tmp_path, monkeypatch, capsys, to):
    folder, state = source
    (tmp_path / "config.json").write_text("{}")  # so that the folder could pass for a checkpoint
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    for target in (folder, tmp_path, tmp_path / "link", "..", "."):
        assert command("neox", folder, target, "--to", to, "--overwrite") == 2
        assert re.search(f"{target} .*{folder}", capsys.readouterr().err)
    assert command("neox", folder / "global_step143", folder, "--to", to, "--overwrite") == 2
    assert_holds(load_neox(folder), state)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "link", "source"}


def test_a_value_that_overflows_leaves_nothing_behind(tmp_path, capsys):
    write(tmp_path / "source", dtype=torch.float32)
    file = layer_file(tmp_path / "source", 4, 1)
    tensors = torch.load(file)
    tensors["mlp.dense_4h_to_h.weight"][7, 5] = 1e6
    torch.save(tensors, file)
    for to in ("flax", "hf", "neox"):
        assert command("neox", tmp_path / "source", tmp_path / "out", "--to", to, "--dtype", "float16") == 2
        assert re.search(r"layers\.2\.ffn\.dense_h4_h\.weight\b.*float16", capsys.readouterr().err)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda config: config | {"model": "AutoregressiveTransformer"},
            "AutoregressiveTransformer",
        ),
        (lambda config: config | {"config": {"n_vocab": -1}}, "config.json: n_vocab=-1"),
        (lambda config: config | {"config": {"color": 1}}, "color"),
        (
            lambda config: config | {"config": config["config"] | {"n_layers": 4}},
            "missing layers.3.attention",
        ),
        (lambda config: config | {"config": config["config"] | {"n_ff": 157}}, "has shape [156], expected [157]"),
    ],
)
def test_a_flax_folder_that_does_not_fit_its_configuration(source, tmp_path, capsys, change, message):
    folder, _ = source
    assert command("neox", folder, tmp_path / "out", "--to", "flax") == 0
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    assert command("inspect", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match=r".+"):
        jaxmodels.load(tmp_path / "out")


def test_a_flax_folder_is_opened_without_being_read(source, tmp_path):
    folder, state = source
    assert command("neox", folder, tmp_path / "out", "--to", "flax") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "params.safetensors", manifest.NAME}
    opened = open_flax(tmp_path / "out")
    assert opened.layout == "safetensors"
    assert opened.tensors.keys() == state.keys()


@pytest.mark.slow
def test_the_command_itself_and_its_help(source, tmp_path):
    folder, _ = source
    run = [sys.executable, "-W", "error", "-m", "jaxmodels.convert"]
    done = subprocess.run([*run, "inspect", folder], capture_output=True, text=True, check=True)
    assert "layer files of 2 model-parallel ranks" in done.stdout
    for name in ("neox", "inspect", "verify"):
        helped = subprocess.run([*run, name, "--help"], capture_output=True, text=True, check=True)
        assert "jaxmodels verify HF/ SHARDS/" in helped.stdout


def test_long_work_has_a_progress_bar_on_a_terminal(source, tmp_path, monkeypatch):
    folder, _ = source
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert command("neox", folder, tmp_path / "quiet", "--to", "hf") == 0
    assert terminal.getvalue() == ""
    monkeypatch.setattr("jaxmodels.weights.progress.SHOWN_FROM", 0)
    for to in ("flax", "hf", "neox"):
        assert command("neox", folder, tmp_path / to, "--to", to) == 0
        assert f"writing {to}" in terminal.getvalue()
    load_neox(folder)
    assert "reading source" in terminal.getvalue()
    assert "618.5/618.5 kB" in terminal.getvalue()  # all of it was told of
