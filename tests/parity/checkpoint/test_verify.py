"""`parity verify`: two checkpoints compared on the command line."""

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from flax import nnx

import jaxmodels
from jaxmodels.convert import from_torch, to_torch
from jaxmodels.convert.hf import save_hf
from jaxmodels.io.formats.torch_files import read_pt
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.retro import NearestNeighborEncoder, RetroModel
from jaxmodels.transformer import AutoregressiveTransformer
from jaxmodels.weights.names import flat_arrays, with_arrays
from parity.checkpoint.opened import opened
from parity.checkpoint.verify import token_inputs
from parity.command import main
from parity.golden.fixture import SHIPPED, read
from parity.golden.replay import rebuilt

ROOT = Path(__file__).parents[3]
CONFIG = NeoXConfig(13, 3 * 4, 1, 3, n_ff=17, rope_percentage=0.5, activation="gelu_tanh", max_len=7)
WRONG = "layers.0.ffn.dense_h_h4.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model as Hugging Face's folder, as ours, with a wrong value, and with another configuration."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = NeoX(CONFIG, rngs=nnx.Rngs(0))
    save_hf(model, folder / "hf")
    jaxmodels.save(model, folder / "ours")
    tensors = to_torch(model)
    tensors[WRONG][2, 3] += 0.5
    jaxmodels.save(from_torch(model, tensors), folder / "wrong")
    jaxmodels.save(NeoX(NeoXConfig(11, 3 * 4, 1, 3, rope_percentage=0.5), rngs=nnx.Rngs(0)), folder / "other")
    torch.save({name: torch.tensor(array) for name, array in to_torch(model).items()}, folder / "model.pt")
    return folder


def test_tensors_are_compared_bit_for_bit(folders, capsys):
    assert main(["verify", str(folders / "hf"), str(folders / "ours")]) == 0
    assert "all 16 tensors are equal" in capsys.readouterr().out
    assert main(["verify", str(folders / "model.pt"), str(folders / "wrong")]) == 1
    shown = capsys.readouterr().out
    assert "1 of 16 tensors differ" in shown
    assert f"{WRONG}: 1 of 204 values differ, by up to 0.5" in shown


def test_configurations_that_differ_are_printed(folders, capsys):
    assert main(["verify", str(folders / "hf"), str(folders / "other"), "--numerics"]) == 1
    shown = capsys.readouterr().out
    assert "n_vocab: 13 and 11" in shown
    assert "activation: gelu_tanh and gelu" in shown


@pytest.mark.slow
def test_settings_that_a_configuration_leaves_out_have_their_defaults(folders, tmp_path, capsys):
    settings = {"n_vocab": 7, "d_model": 12, "heads": 3, "d_ff": 20, "n_layers": 1, "attention": "plain"}
    plain = jaxmodels.models.build("AutoregressiveTransformer", settings)
    for name, model, left_out in (
        ("rotary", plain, "attention"),
        ("gelu", NeoX(CONFIG, rngs=nnx.Rngs(0)), "activation"),
    ):
        jaxmodels.save(model, tmp_path / name)
        content = json.loads((tmp_path / name / "config.json").read_text())
        del content["config"][left_out]
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    jaxmodels.save(plain, tmp_path / "plain")
    for one, other, said in (
        (tmp_path / "plain", "rotary", "plain and rotary"),
        (folders / "hf", "gelu", "gelu_tanh and gelu"),
    ):
        assert main(["verify", str(tmp_path / other), str(one)]) == 1
        assert "have different configurations" in capsys.readouterr().out
        assert main(["verify", str(one), str(tmp_path / other)]) == 1
        assert said in capsys.readouterr().out


@pytest.mark.slow
def test_outputs_of_a_model_whose_configuration_leaves_out_the_vocabulary(tmp_path, capsys):
    size = NeoXConfig.__dataclass_fields__["n_vocab"].default
    jaxmodels.save(
        NeoX(NeoXConfig(size, 4, 1, 1, n_ff=3, rope_percentage=0.5, max_len=7), rngs=nnx.Rngs(0)), tmp_path / "model"
    )
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    del content["config"]["n_vocab"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(content))
    assert main(["verify", str(tmp_path / "model"), str(tmp_path / "model"), "--numerics", "--tokens", "2"]) == 0
    assert "are equal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nothing", "ours"], "nothing does not exist"),
        (["model.pt", "model.pt"], "have no configuration"),
        (["hf", "ours", "--tokens", "0"], "--tokens 0 must be at least 1"),
    ],
)
def test_errors_are_one_line(folders, capsys, monkeypatch, arguments, text):
    monkeypatch.chdir(folders)
    assert main(["verify", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("parity verify: ")
    assert text in line


@pytest.mark.slow
def test_outputs_show_where_a_wrong_tensor_matters(folders, capsys):
    assert main(["verify", str(folders / "hf"), str(folders / "wrong"), "--numerics", "--tokens", "5"]) == 1
    shown = capsys.readouterr().out
    assert "1 of 16 tensors differ" in shown
    assert "hf (PyTorch), wrong (Flax): DIFFERS" in shown
    assert "first divergence: layers.0.ffn.dense_h_h4" in shown
    assert "FAILED output (float64)" in shown
    assert "GPTNeoXForCausalLM" in shown


@pytest.mark.slow
def test_outputs_of_equal_checkpoints_agree(folders):
    command = [sys.executable, "-m", "parity", "verify", "hf", "ours", "--numerics", "--seed", "3"]
    done = subprocess.run(command, cwd=folders, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 16 tensors are equal" in done.stdout
    assert "hf (PyTorch), ours (Flax): agrees" in done.stdout
    assert "Flax keeps the weights of ours" in done.stdout


@pytest.mark.parametrize("name", ["rope.rotary", "synthesizer.dense", "retro.neighbors", "neox.parallel"])
def test_random_tokens_fit_the_model(name):
    fixture = read(SHIPPED / name)
    model = rebuilt(fixture)
    checkpoint = opened(fixture.state).of_model(fixture.model["model"], fixture.model["config"])
    inputs = token_inputs(checkpoint, None, 0)
    logits = nnx.eval_shape(lambda called, *ids: called(*ids), model, *inputs)
    assert logits.shape == (*inputs[0].shape, checkpoint.config["n_vocab"])
    assert inputs[0].size >= 3 * 29
    assert all(0 <= ids.min() <= ids.max() < checkpoint.config["n_vocab"] for ids in inputs)
    assert len(inputs) == 1 + (name == "retro.neighbors")
    assert np.array_equal(token_inputs(checkpoint, None, 0)[0], inputs[0])


def test_a_retro_has_tokens_of_a_chunk_at_least():
    config = {"n_vocab": 29, "chunk_len": 64}
    ids, neighbors = token_inputs(types.SimpleNamespace(model="RetroModel", config=config), None, 0)
    assert (ids.shape, neighbors.shape) == ((3, 128), (3, 2, 2, 128))
    with pytest.raises(ValueError, match="--tokens 63 must be at least 64"):
        token_inputs(types.SimpleNamespace(model="RetroModel", config=config), 63, 0)


def test_a_configuration_alone_asks_for_no_long_texts():
    """Weights of a RETRO model do not depend on the length of its chunks."""
    model = types.SimpleNamespace(model="RetroModel", config={"n_vocab": 29, "chunk_len": 10**12}, where="model")
    with pytest.raises(ValueError, match=r"model has chunk_len=1,000,000,000,000: name a length with --tokens"):
        token_inputs(model, None, 0)
    model.config["chunk_len"] = 513
    with pytest.raises(ValueError, match=r"chunk_len=513.* --tokens"):
        token_inputs(model, None, 0)
    assert token_inputs(model, 600, 0)[0].shape == (3, 600)


@pytest.mark.slow
def test_a_configuration_alone_asks_for_no_large_arrays(tmp_path, capsys):
    """Heads of two features each, 10,000 of them, take a few megabytes of weights and a gigabyte for their scores."""
    rngs = nnx.Rngs(0)
    encoder = NearestNeighborEncoder(3, 1, [0], 1, 10_000, 2, 5, rngs=rngs)
    jaxmodels.save(RetroModel(11, 1, 1, [0], 3, 10_000, 2, 5, encoder, rngs=rngs), tmp_path / "model")
    assert main(["verify", str(tmp_path / "model"), str(tmp_path / "model"), "--numerics"]) == 2
    assert re.search(r"model needs --tokens N: .*\[3, 61\].* at most ", capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize("narrow", ["SRC", "DST"])
def test_floats_of_8_bits_are_compared_but_not_computed_with(tmp_path, capsys, narrow):
    model = AutoregressiveTransformer(5, 8, 2, 5, 1, rngs=nnx.Rngs(0))
    jaxmodels.save(model, tmp_path / "wide")
    arrays = {path: array.astype("float8_e4m3fn") for path, array in flat_arrays(model).items()}
    jaxmodels.save(with_arrays(model, arrays), tmp_path / "narrow")
    given = [str(tmp_path / name) for name in (["narrow", "wide"] if narrow == "SRC" else ["wide", "narrow"])]
    assert main(["verify", *given]) == (1 if narrow == "SRC" else 0)
    assert main(["verify", *given, "--numerics"]) == 2
    assert re.search(r"narrow: '.*' is float8_e4m3fn; PyTorch runs", capsys.readouterr().err)


@pytest.mark.parametrize("key", [None, "model"])
def test_a_file_is_read_once(tmp_path, monkeypatch, key):
    held = {"a": torch.arange(5.0)}
    torch.save(held if key is None else {key: held, "step": 3}, tmp_path / "model.pt")
    read = []

    def counted(*arguments):
        read.append(arguments[0])
        return read_pt(*arguments)

    for module in ("parity.checkpoint.opened", "jaxmodels.io.formats.torch_files"):
        monkeypatch.setattr(f"{module}.read_pt", counted)
    assert opened(tmp_path / "model.pt").tensors["a"].tolist() == [0, 1, 2, 3, 4]
    assert read == [tmp_path / "model.pt"]


def test_help_lists_the_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "verify" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["verify", "--help"])
    assert "--numerics" in capsys.readouterr().out


def test_a_tensor_that_numpy_lacks_is_named_with_its_file(tmp_path, capsys):
    torch.save({"a": torch.zeros(2, 3)}, tmp_path / "wide.pt")
    torch.save({"a": torch.zeros(2, 3).to(torch.float8_e5m2)}, tmp_path / "narrow.pt")
    assert main(["verify", str(tmp_path / "wide.pt"), str(tmp_path / "narrow.pt")]) == 2
    assert re.search(rf"{tmp_path}/narrow\.pt: 'a': .*float8_e5m2", capsys.readouterr().err)
