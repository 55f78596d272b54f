"""Names of tensors as wrappers of PyTorch change them, made by those wrappers."""

import re

import peft
import pytest
import torch

from jaxmodels.convert.hf import open_hf
from tests.jaxmodels.convert.hf.folders import buffers, model, published, write_bin, write_config, write_safetensors
from tests.jaxmodels.convert.hf.test_forms import assert_equal, held

# Of torch.compile and peft on import, about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def made():
    return model()


class Wrapper(torch.nn.Module):
    """As DataParallel, whose own constructor looks for devices."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class Lightning(torch.nn.Module):
    """As a LightningModule, which has the model as an attribute, beside others."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.criterion = torch.nn.Linear(3, 2)


def compiled_inside(made):
    made.gpt_neox.layers[1] = torch.compile(made.gpt_neox.layers[1])
    return made


def base_compiled(made):
    made.gpt_neox = torch.compile(made.gpt_neox)
    return made


WRAPPED = {
    "DDP": (Wrapper, "module."),
    "compile": (torch.compile, "_orig_mod."),
    "DDP of compile": (lambda made: Wrapper(torch.compile(made)), "module._orig_mod."),
    "compile of DDP": (lambda made: torch.compile(Wrapper(made)), "_orig_mod.module."),
    "Lightning": (Lightning, "model."),
    "the base compiled": (base_compiled, "_orig_mod."),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_prefix_is_proposed_and_removed(tmp_path, made, kind, suffix):
    wrap, prefix = WRAPPED[kind]
    state = published(wrap(model())) | {f"{prefix}{k}": v for k, v in buffers().items() if kind != "the base compiled"}
    write_config(tmp_path, made)
    (write_bin if suffix == "bin" else write_safetensors)(tmp_path, state)
    n = sum(prefix in name for name in state)
    count = rf"all {n}" if n == len(state) else rf"{n} of {len(state)}"
    with pytest.raises(
        ValueError, match=rf"^\S*\.{suffix}: the names of {count} .*'{re.escape(prefix)}'.*--strip-prefix {prefix}$"
    ):
        open_hf(tmp_path)
    assert_equal(held(tmp_path, strip_prefix=prefix), published(made))
    assert_equal(held(tmp_path, strip_prefix=prefix.rstrip(".")), published(made))
    if kind == "Lightning":
        assert any("criterion.bias" in note for note in open_hf(tmp_path, strip_prefix=prefix).notes)
    with pytest.raises(ValueError, match=r"strip_prefix='other\.'"):
        open_hf(tmp_path, strip_prefix="other.")


def test_one_layer_that_was_compiled(tmp_path, made):
    write_config(tmp_path, made)
    write_bin(tmp_path, published(compiled_inside(model())))
    with pytest.raises(ValueError, match=r"12 of 40 .*'_orig_mod\.'"):
        open_hf(tmp_path)
    assert_equal(held(tmp_path, strip_prefix="_orig_mod."), published(made))


@pytest.mark.parametrize(
    ("wrap", "entry"),
    [
        (
            lambda state: {"state_dict": state, "epoch": 3, "optimizer_states": [{"state": {0: torch.ones(2)}}]},
            "state_dict",
        ),
        (lambda state: {"model_state_dict": state, "optimizer_state_dict": {"a": torch.ones(3)}}, "model_state_dict"),
        (lambda state: {"model": state, "ema": dict(state), "step": 7}, "model"),
        (lambda state: {"weights": state, "loss": 0.5}, "weights"),
        (lambda state: {"trainer": {"state_dict": state}, "args": {"lr": 1e-3}}, "trainer.state_dict"),
    ],
    ids=["Lightning", "tutorial", "ema", "another", "nested"],
)
def test_a_state_dict_inside_a_checkpoint(tmp_path, made, wrap, entry):
    write_config(tmp_path, made)
    state = {f"model.{name}": tensor for name, tensor in published(made).items()}
    write_bin(tmp_path, wrap(state))
    with pytest.raises(ValueError, match=r"all 40 .*'model\.'"):
        open_hf(tmp_path)
    assert_equal(held(tmp_path, strip_prefix="model."), published(made))
    assert any(
        f"entry '{entry}' of pytorch_model.bin" in note for note in open_hf(tmp_path, strip_prefix="model.").notes
    )


def test_several_state_dicts_are_named(tmp_path, made):
    write_config(tmp_path, made)
    write_bin(tmp_path, {"student": published(made), "teacher": published(made)})
    with pytest.raises(ValueError, match=r"pytorch_model\.bin .*'student', 'teacher'"):
        open_hf(tmp_path)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [torch.ones(3)], {0: torch.ones(3)}, torch.ones(3), None])
def test_a_file_without_a_state_dict(tmp_path, made, content):
    write_config(tmp_path, made)
    write_bin(tmp_path, content)
    with pytest.raises(ValueError, match=r"^\S*pytorch_model\.bin [^\n]*$"):
        open_hf(tmp_path)


def test_other_entries_of_a_state_dict_are_left_out(tmp_path, made):
    write_config(tmp_path, made)
    write_bin(
        tmp_path, published(made) | {"epoch": 3, "_metadata": {}, "note": None, "sparse": torch.eye(3).to_sparse()}
    )
    assert_equal(held(tmp_path), published(made))


def test_weights_of_peft(tmp_path, made):
    """Merged they have a prefix; with an adapter inside they are refused."""
    write_config(tmp_path, made)
    config = peft.LoraConfig(r=2, target_modules=["query_key_value"], init_lora_weights=True)
    adapted = peft.get_peft_model(model(), config)
    write_bin(tmp_path, published(adapted))
    with pytest.raises(
        ValueError, match=r"pytorch_model\.bin .*PEFT.*query_key_value\.(base_layer|lora_A).*merge_and_unload"
    ):
        open_hf(tmp_path)
    with pytest.raises(ValueError, match=r"PEFT"):
        open_hf(tmp_path, strip_prefix="base_model.model.")
    adapted = peft.get_peft_model(model(), config)
    adapted.base_model.unload()  # the adapter is removed, the wrapper stays
    write_bin(tmp_path, published(adapted))
    with pytest.raises(ValueError, match=r"'base_model\.model\.'"):
        open_hf(tmp_path)
    assert_equal(held(tmp_path, strip_prefix="base_model.model."), published(made))
