"""Adapters in PEFT's format: read by peft itself, which computes the same."""

import json

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx

from jaxmodels.convert.command import main as convert
from jaxmodels.convert.hf import save_hf
from jaxmodels.convert.peft import CONFIG as CONFIG_FILE
from jaxmodels.convert.peft import write_peft
from jaxmodels.models import save
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.neox.lora import TARGETS, LoRA, LoRANeoX
from jaxmodels.weights.names import flat_arrays, with_arrays
from tests.common import filled, normal, run

# peft reads an attribute that transformers renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CONFIG = NeoXConfig(n_vocab=37, n_hidden=30, n_layers=3, n_heads=5, n_ff=22, rope_percentage=0.7, max_len=19)
IDS = np.random.default_rng(0).integers(0, 37, (2, 11))


def with_adapter(base: NeoX, lora: LoRA) -> LoRANeoX:
    model = LoRANeoX.of(base, lora)
    arrays = {
        path: 0.2 * normal(i, *array.shape) if "lora" in str(path[-1]) else array
        for i, (path, array) in enumerate(flat_arrays(model).items())
    }
    return with_arrays(model, arrays)


def loaded(folder, base) -> peft.PeftModel:
    """The adapter on its base model, by peft; every tensor of the file must have been used."""
    model = transformers.GPTNeoXForCausalLM.from_pretrained(base)
    adapted = peft.PeftModel.from_pretrained(model, folder)
    report = adapted.load_adapter(folder, adapter_name="again")
    assert not report.unexpected_keys
    assert not [key for key in report.missing_keys if "lora" in key]
    return adapted


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoRA(3, 5.0), LoRA(2, 2.5, tuple(TARGETS))], ids=["one", "all"])
def test_peft_computes_what_the_model_computes(tmp_path, lora):
    base = filled(lambda: NeoX(CONFIG, rngs=nnx.Rngs(0)), scale=0.3)
    model = with_adapter(base, lora)
    save_hf(base, tmp_path / "base")
    write_peft(model if len(lora.targets) > 1 else model.unstacked(), tmp_path / "adapter", str(tmp_path / "base"))
    theirs = loaded(tmp_path / "adapter", tmp_path / "base")
    expected = run(model, jnp.asarray(IDS))
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.tensor(IDS)).logits, expected, atol=1e-4)
        np.testing.assert_allclose(theirs.merge_and_unload()(torch.tensor(IDS)).logits, expected, atol=1e-4)
    assert np.abs(run(base, jnp.asarray(IDS)) - expected).max() > 0.1


def test_the_files_are_those_that_peft_writes(tmp_path):
    base = filled(lambda: NeoX(CONFIG, rngs=nnx.Rngs(0)))
    save_hf(base, tmp_path / "base")
    write_peft(LoRANeoX.of(base, LoRA(3, 6.0, ("dense", "query_key_value"))), tmp_path / "ours", "org/base")
    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["query_key_value", "dense"], task_type="CAUSAL_LM")
    torch_base = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path / "base")
    peft.get_peft_model(torch_base, settings).save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / name / CONFIG_FILE).read_text()) for name in ("ours", "theirs"))
    assert ours.keys() <= theirs.keys()
    assert ours.pop("base_model_name_or_path") == "org/base"
    assert sorted(theirs["target_modules"]) == sorted(ours.pop("target_modules"))
    assert {key: theirs[key] for key in ours} == ours
    assert {file.name for file in (tmp_path / "ours").iterdir()} >= {CONFIG_FILE, "adapter_model.safetensors"}
    files = [safetensors_of(tmp_path / name) for name in ("ours", "theirs")]
    assert files[0] == files[1]


def safetensors_of(folder) -> dict:
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "np") as file:
        return {key: (file.get_slice(key).get_shape(), file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118


def test_only_a_model_with_an_adapter_is_written(tmp_path, capsys):
    base = filled(lambda: NeoX(CONFIG, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="model is a NeoX"):
        write_peft(base, tmp_path / "out")
    save(base, tmp_path / "base")
    save(LoRANeoX.of(base, LoRA()), tmp_path / "lora")
    for flags, named in ((["base"], "base has no LoRA"), (["lora", "--dtype", "float16"], "--dtype")):
        arguments = ["neox", str(tmp_path / flags[0]), str(tmp_path / "out"), "--to", "peft", *flags[1:]]
        with pytest.raises(SystemExit) as stopped:
            raise SystemExit(convert(arguments))
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert named in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert convert(["neox", str(tmp_path / "lora"), str(tmp_path / "out"), "--to", "peft"]) == 0
    assert "rank 8" in capsys.readouterr().out


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_an_adapter_that_is_not_finite_is_not_exported(tmp_path, capsys, value):
    model = LoRANeoX.of(filled(lambda: NeoX(CONFIG, rngs=nnx.Rngs(0))), LoRA())
    arrays = {
        path: jnp.full_like(array, value) if "lora" in str(path[-1]) else array
        for path, array in flat_arrays(model).items()
    }
    model = with_arrays(model, arrays)
    with pytest.raises(ValueError, match=r"layers\S+kernel is not finite with its adapter"):
        write_peft(model, tmp_path / "out")
    save(model, tmp_path / "lora")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        raise SystemExit(convert(["neox", str(tmp_path / "lora"), str(tmp_path / "out"), "--to", "peft"]))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'lora'}: layers" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "lora",
    [3, [], "ab", {"rank": 0}, {"alpha": 10**400}, {"alpha": float("inf")}, {"targets": 5}, {"more": 1}],
    ids=str,
)
def test_a_configuration_without_an_adapter_is_one_line(tmp_path, capsys, lora):
    save(LoRANeoX(CONFIG, LoRA(2, 4.0), rngs=nnx.Rngs(0)), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    content = json.loads(file.read_text())
    content["config"]["lora"] = lora
    file.write_text(json.dumps(content))
    for command in (["inspect"], ["neox", str(tmp_path / "out"), "--to", "peft"]):
        assert convert([command[0], str(tmp_path / "model"), *command[1:]]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(file) in line
    assert not (tmp_path / "out").exists()
