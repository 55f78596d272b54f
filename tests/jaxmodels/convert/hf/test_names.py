"""Names of tensors in files of strangers."""

import time

import numpy as np
import pytest

from jaxmodels.convert.hf.names import check_no_adapter, twin_names
from jaxmodels.neox import NeoXConfig


@pytest.mark.parametrize("name", ["lora_A.weight", "a.lora_A", "a.lora_a.weight", "a..b", "a.base_layers.weight"])
def test_a_name_without_a_word_of_an_adapter_inside_is_accepted(name):
    check_no_adapter([name], "file")


@pytest.mark.parametrize("word", ["lora_A", "lora_B", "lora_magnitude_vector", "base_layer", "original_module"])
def test_a_word_of_an_adapter_inside_a_name_is_found(word):
    with pytest.raises(ValueError, match="adapter weights of PEFT"):
        check_no_adapter(["a", f"layers.0.dense.{word}.default.weight"], "file")


def test_a_long_name_takes_linear_time_and_is_shortened():
    start = time.process_time()
    with pytest.raises(ValueError, match=r"^file has layers with adapter weights of PEFT \(.{1,300}\); merge"):
        check_no_adapter([".lora_A" * 100_000 + "\n"], "file")
    assert time.process_time() - start < 1


BUFFERS = {
    "bias": np.ones((1, 1), bool),
    "masked_bias": np.float16(-1e4),
    "rotary_emb.inv_freq": np.ones(1, np.float32),
}


@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("name", ["gpt_neox.layers.{}.attention.", "a{}.attention.", "gpt_neox.layers.0{}.attention."])
def test_buffers_of_layers_that_the_model_lacks_are_not_compared(name, buffer):
    config = NeoXConfig(7, 4, 2, 2, rope_percentage=1)
    names = [f"{name.format(i)}{buffer}" for i in range(100_000)]
    start = time.process_time()
    found = twin_names(dict.fromkeys(names, BUFFERS[buffer]), config, "file")
    assert time.process_time() - start < 2  # 10 s if each is compared
    ignored = buffer == "rotary_emb.inv_freq"
    assert len(found) == (0 if ignored else 100_000 - (2 if name.startswith("gpt_neox.layers.{}") else 0))


def test_a_tensor_has_one_name():
    name = "layers.0.attention.output.weight"
    config = NeoXConfig(7, 4, 1, 2, rope_percentage=1)
    tensors = {"gpt_neox.layers.0.attention.dense.weight": np.ones((4, 4)), name: np.zeros((4, 4))}
    with pytest.raises(ValueError, match=f"^file has two tensors that are '{name}'"):
        twin_names(tensors, config, "file")
