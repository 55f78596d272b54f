"""`python -m jaxmodels.convert`: real files, there and back."""

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx

import jaxmodels
import torch_ref.transformer
from jaxmodels.command import main as command
from jaxmodels.convert import operations
from jaxmodels.convert.command import main
from jaxmodels.generate import generate
from jaxmodels.io import manifest
from jaxmodels.io.atomic import atomic_file
from jaxmodels.neox import NeoX, NeoXConfig, quantize
from jaxmodels.transformer import AutoregressiveTransformer
from jaxmodels.weights.names import flat_arrays, with_arrays
from tests.fuzz.targets import TARGETS

CONFIG = {"n_vocab": 13, "d_model": 12, "heads": 3, "d_ff": 17, "n_layers": 2}


@pytest.fixture
def pt(tmp_path):
    """A .pt file as the PyTorch twin saves it, and the twin."""
    torch.manual_seed(0)
    module = torch_ref.transformer.AutoregressiveTransformer(**CONFIG)
    torch.save(module.state_dict(), tmp_path / "model.pt")
    return tmp_path / "model.pt", module


def convert(*arguments) -> int:
    return main(["torch", *map(str, arguments)])


def to_flax(file, out, *more, config=CONFIG):
    return convert("--model", "rope", "--config", json.dumps(config), file, out, *more)


def greedy_torch(module, ids, n):
    """The next n tokens, each from a full forward pass."""
    ids = torch.as_tensor(ids)
    with torch.no_grad():
        for _ in range(n):
            ids = torch.cat([ids, module(ids)[-1].argmax(dim=-1)[None]])
    return ids[-n:].numpy()


@pytest.mark.slow
def test_a_torch_file_samples_the_same_greedy_tokens_in_flax(pt, tmp_path, capsys):
    file, module = pt
    assert to_flax(file, tmp_path / "out") == 0
    assert "AutoregressiveTransformer" in capsys.readouterr().out
    model = jaxmodels.load(tmp_path / "out")
    prompt = np.random.default_rng(0).integers(0, 13, (7, 5))
    np.testing.assert_array_equal(generate(model, prompt, 41), greedy_torch(module, prompt, 41))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_there_and_back_keeps_every_bit(pt, tmp_path, dtype):
    file, module = pt
    torch.save(module.to(dtype).state_dict(), file)
    assert to_flax(file, tmp_path / "out") == 0
    assert convert(tmp_path / "out", tmp_path / "back.pt") == 0
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor), name


@pytest.mark.slow
def test_the_command_itself_and_its_help(pt, tmp_path):
    file, _ = pt
    (tmp_path / "model.json").write_text(json.dumps(CONFIG))
    command = [sys.executable, "-m", "jaxmodels.convert", "torch"]
    arguments = ["--model", "rope", "--config", tmp_path / "model.json", file, tmp_path / "out"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == {"config.json", "params", manifest.NAME}
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "--config" in helped.stdout


def test_a_dtype_casts(pt, tmp_path):
    file, _ = pt
    assert to_flax(file, tmp_path / "out", "--dtype", "bfloat16") == 0
    assert {str(a.dtype) for a in jax.tree.leaves(jaxmodels.load(tmp_path / "out"))} == {"bfloat16"}


@pytest.mark.slow
def test_a_dtype_casts_on_the_way_back(pt, tmp_path, capsys):
    file, module = pt
    assert to_flax(file, tmp_path / "out") == 0
    assert convert(tmp_path / "out", tmp_path / "back.pt", "--dtype", "bfloat16") == 0
    assert capsys.readouterr().out.endswith("bfloat16\n")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert all(torch.equal(back[name], tensor.bfloat16()) for name, tensor in module.state_dict().items())


def test_a_dtype_that_overflows_is_refused_both_ways(pt, tmp_path, capsys):
    file, module = pt
    state_dict = module.state_dict()
    state_dict["generator.projection.bias"][3] = 1e5
    torch.save(state_dict, file)
    assert to_flax(file, tmp_path / "half", "--dtype", "float16") == 2
    assert to_flax(file, tmp_path / "out") == 0
    assert convert(tmp_path / "out", tmp_path / "back.pt", "--dtype", "float16") == 2
    assert capsys.readouterr().err.count("generator.projection.bias has values that overflow in dtype=float16") == 2
    assert not (tmp_path / "half").exists()
    assert not (tmp_path / "back.pt").exists()


def test_an_entry_of_a_larger_checkpoint(pt, tmp_path, capsys):
    file, module = pt
    torch.save({"model": module.state_dict(), "step": 3}, file)
    assert to_flax(file, tmp_path / "out") == 2
    assert "'model', 'step'" in capsys.readouterr().err
    assert to_flax(file, tmp_path / "out", "--key", "model") == 0


def test_numbers_of_numpy_beside_an_entry_are_left_out(pt, tmp_path):
    file, module = pt
    torch.save({"model": module.state_dict(), "best": np.float64(0.5), "history": np.zeros(3)}, file)
    assert to_flax(file, tmp_path / "out", "--key", "model") == 0


@pytest.mark.slow
def test_a_prefix_of_the_names_is_removed(pt, tmp_path, capsys):
    file, module = pt
    torch.save({f"module.{name}": tensor for name, tensor in module.state_dict().items()}, file)
    assert to_flax(file, tmp_path / "out") == 2
    assert "module." in capsys.readouterr().err
    assert to_flax(file, tmp_path / "out", "--strip-prefix", "module.") == 0
    assert to_flax(file, tmp_path / "no", "--strip-prefix", "other.") == 2
    assert "strip_prefix='other.'" in capsys.readouterr().err
    torch.save(module.state_dict(), file)
    assert to_flax(file, tmp_path / "plain") == 0
    outputs = [jaxmodels.load(tmp_path / name)(np.array([[3], [5], [7]])) for name in ("out", "plain")]
    assert np.array_equal(*outputs)


@pytest.mark.parametrize("flag", ["--revision", "--variant"])
def test_flags_of_other_sources_are_refused(pt, tmp_path, capsys, flag):
    assert to_flax(pt[0], tmp_path / "out", flag, "a") == 2
    assert re.search(rf"{flag} is for .*model\.pt is a file", capsys.readouterr().err)


def test_an_integer_that_no_float_holds_is_refused(pt, tmp_path, capsys):
    assert to_flax(pt[0], tmp_path / "out", config=CONFIG | {"d_model": 10**400}) == 2
    assert re.search(r"--config .*an integer of 401 digits", capsys.readouterr().err)


def test_old_files_that_are_no_zip_are_read_too(pt, tmp_path):
    file, module = pt
    torch.save(module.state_dict(), file, _use_new_zipfile_serialization=False)
    assert to_flax(file, tmp_path / "out") == 0


class Malicious:
    def __reduce__(self):
        return (eval, ("__import__('pathlib').Path('pwned').touch()",))


def malicious(file, tmp_path):
    with file.open("wb") as stream:
        pickle.dump({"src_embed.weight": Malicious()}, stream, protocol=2)


def malicious_zip(file, tmp_path):
    torch.save({"src_embed.weight": Malicious()}, file)


def truncated(file, tmp_path):
    file.write_bytes(file.read_bytes()[:-999])


def empty(file, tmp_path):
    file.write_bytes(b"")


def missing(file, tmp_path):
    file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (malicious, "refused"),
        (malicious_zip, "refused"),
        (truncated, "model.pt"),
        (empty, "model.pt"),
        (missing, "model.pt"),
    ],
)
def test_a_bad_file_is_one_clear_error_and_nothing_is_written(pt, tmp_path, monkeypatch, capsys, damage, message):
    file, _ = pt
    monkeypatch.chdir(tmp_path)
    damage(file, tmp_path)
    assert to_flax(file, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**CONFIG, "n_layers": 3}, "missing (16)"),
        ({**CONFIG, "d_ff": 19}, "misshapen"),
        ({**CONFIG, "heads": 5}, "d_model=12"),
        ({**CONFIG, "color": 1}, "color"),
        ({**CONFIG, "attention": "rotten"}, "rotten"),
    ],
)
def test_a_configuration_that_does_not_fit(pt, tmp_path, capsys, config, message):
    file, _ = pt
    assert to_flax(file, tmp_path / "out", config=config) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", ["{not json", "[1]", "nowhere.json"])
def test_a_configuration_that_is_no_json_object(pt, tmp_path, capsys, config):
    file, _ = pt
    assert convert("--model", "rope", "--config", config, file, tmp_path / "out") == 2
    assert "--config" in capsys.readouterr().err


def test_the_url_of_a_bucket_is_no_file(pt, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert to_flax(pt[0], tmp_path / "model") == 0
    before = sorted(tmp_path.iterdir())
    assert convert(tmp_path / "model", "gs://bucket/x.pt") == 2
    assert "gs://bucket/x.pt" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(ValueError, match=r"gs://bucket/x\.json"), atomic_file(Path("gs://bucket/x.json")):
        pass


def test_nothing_is_replaced_unasked(pt, tmp_path, capsys):
    file, _ = pt
    assert to_flax(file, tmp_path / "out") == 0
    assert to_flax(file, tmp_path / "out") == 2
    assert str(tmp_path / "out") in capsys.readouterr().err
    assert to_flax(file, tmp_path / "out", "--overwrite") == 0
    assert convert(tmp_path / "out", file) == 2
    assert convert(tmp_path / "out", file, "--overwrite") == 0


@pytest.mark.parametrize("flag", [(), ("--overwrite",)])
def test_a_link_to_nothing_is_not_replaced(pt, tmp_path, capsys, flag):
    file, _ = pt
    assert to_flax(file, tmp_path / "out") == 0
    link = tmp_path / "link.pt"
    link.symlink_to(tmp_path / "absent.pt")
    assert convert(tmp_path / "out", link, *flag) == 2
    assert "link.pt" in capsys.readouterr().err
    assert link.is_symlink()
    assert not link.exists()


def test_floats_of_8_bits_are_no_state_dict_until_they_are_cast(tmp_path, capsys):
    model = AutoregressiveTransformer(5, 8, 2, 5, 1, rngs=nnx.Rngs(0))
    arrays = {path: array.astype("float8_e4m3fn") for path, array in flat_arrays(model).items()}
    jaxmodels.save(with_arrays(model, arrays), tmp_path / "model")
    assert convert(tmp_path / "model", tmp_path / "new" / "model.pt") == 2
    assert re.search(r"^.*/model\.pt: .*float8_e4m3fn.*\n$", capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert convert(tmp_path / "model", tmp_path / "model.pt", "--dtype", "float32") == 0


@pytest.mark.parametrize("content", ["mine", "zip", "TorchScript"])
def test_a_file_of_another_program_is_not_replaced(pt, tmp_path, capsys, content):
    file, _ = pt
    assert to_flax(file, tmp_path / "out") == 0
    mine = tmp_path / "mine.pt"
    if content == "zip":
        with zipfile.ZipFile(mine, "w") as opened:
            opened.writestr("letter.txt", "mine")
    elif content == "TorchScript":
        with warnings.catch_warnings(action="ignore"):  # it is deprecated
            torch.jit.script(torch.nn.Linear(2, 3)).save(mine)
    else:
        mine.write_text("mine")
    before = mine.read_bytes()
    assert convert(tmp_path / "out", mine, "--overwrite") == 2
    assert f"{mine} is no file of torch.save" in capsys.readouterr().err
    assert mine.read_bytes() == before


@pytest.mark.parametrize("flag", [(), ("--overwrite",)])
def test_a_fifo_is_no_target(pt, tmp_path, capsys, flag):
    file, _ = pt
    assert to_flax(file, tmp_path / "out") == 0
    os.mkfifo(tmp_path / "fifo.pt")
    assert convert(tmp_path / "out", tmp_path / "fifo.pt", *flag) == 2
    assert "fifo.pt" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llm.int8", "weights", "weights-4"])
def test_a_quantized_model_has_no_state_dict(tmp_path, capsys, kind):
    model = NeoX(NeoXConfig(n_vocab=11, n_hidden=128, n_layers=1, n_heads=2), rngs=nnx.Rngs(0))
    jaxmodels.save(quantize(model, kind=kind), tmp_path / "model")
    assert convert(tmp_path / "model", tmp_path / "out.pt") == 2
    assert "is quantized" in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()


def test_a_file_that_appears_while_the_source_is_read_is_kept(pt, tmp_path, capsys, monkeypatch):
    file, _ = pt
    assert to_flax(file, tmp_path / "out") == 0
    target, to_torch = tmp_path / "new.pt", operations.to_torch

    def meanwhile(model):
        target.write_text("mine")
        return to_torch(model)

    monkeypatch.setattr(operations, "to_torch", meanwhile)
    for flags, why in (([], "exists"), (["--overwrite"], "no file of torch.save")):
        target.unlink(missing_ok=True)
        assert convert(tmp_path / "out", target, *flags) == 2
        assert f"{target} " in (said := capsys.readouterr().err)
        assert why in said
        assert target.read_text() == "mine"


def test_the_source_is_never_overwritten(pt, tmp_path, capsys):
    file, _ = pt
    (tmp_path / "config.json").write_text("{}")  # so that the folder could pass for a checkpoint
    assert to_flax(file, tmp_path, "--overwrite") == 2
    assert str(file) in capsys.readouterr().err
    assert to_flax(file, tmp_path / "out") == 0
    assert convert(tmp_path / "out", tmp_path / "out", "--overwrite") == 2
    assert str(tmp_path / "out") in capsys.readouterr().err
    assert file.exists()


def test_what_a_file_holds_must_be_said(pt, tmp_path, capsys):
    file, _ = pt
    assert convert(file, tmp_path / "out") == 2
    assert "--model and --config" in capsys.readouterr().err


def test_an_object_that_is_no_state_dict(tmp_path, capsys):
    buffer = io.BytesIO()
    torch.save([torch.zeros(3)], buffer)
    (tmp_path / "list.pt").write_bytes(buffer.getvalue())
    assert to_flax(tmp_path / "list.pt", tmp_path / "out") == 2
    assert "a list" in capsys.readouterr().err


def test_a_configuration_that_contradicts_the_name(pt, tmp_path, capsys):
    """rotary, rotary_value and plain have the same parameters: nothing else would tell."""
    file, _ = pt
    assert to_flax(file, tmp_path / "out", config={**CONFIG, "attention": "plain"}) == 2
    assert re.search("--model rope .*attention='rotary'.*'plain'", capsys.readouterr().err)
    assert convert("--model", "synthesizer", "--config", json.dumps(CONFIG), file, tmp_path / "out") == 2
    assert "--model synthesizer" in capsys.readouterr().err


def test_the_config_json_of_a_checkpoint_is_a_configuration(pt, tmp_path):
    file, _ = pt
    assert to_flax(file, tmp_path / "out") == 0
    config = tmp_path / "out" / "config.json"
    assert convert("--model", "rope", "--config", config, file, tmp_path / "again") == 0
    assert (tmp_path / "again" / "config.json").read_text() == config.read_text()


def test_names_of_several_lines_are_printed_in_one(tmp_path, capsys):
    """Names of folders, as a stranger's archive may have them, cannot imitate output or steer the terminal."""
    folder = tmp_path / "a\n\x1b[31mred\u202e"
    TARGETS["model"].make(tmp_path / "model")
    (tmp_path / "model").rename(folder)  # save refuses to write under such a name
    for arguments in (["inspect", str(folder)], ["verify", str(folder), str(folder)]):
        assert command(arguments) == 0
        printed = capsys.readouterr().out
        assert printed.replace("\n", "").isprintable()
        assert r"a\n\x1b[31mred\u202e" in printed or "verify" in arguments
    assert command(["inspect", str(folder / "nothing")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()


def test_a_setting_that_a_file_leaves_out_has_its_default_in_a_comparison(pt, tmp_path, capsys):
    file, _ = pt
    assert to_flax(file, tmp_path / "one") == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    about = tmp_path / "two" / "config.json"
    content = json.loads(about.read_text())
    about.write_text(json.dumps(content | {"config": content["config"] | {"attention": "plain"}}))
    del content["config"]["attention"]
    (tmp_path / "one" / "config.json").write_text(json.dumps(content))
    assert main(["verify", str(tmp_path / "one"), str(tmp_path / "two")]) == 1
    assert "attention: rotary and plain" in capsys.readouterr().out
