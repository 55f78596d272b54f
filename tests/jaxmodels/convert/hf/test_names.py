"""Names of tensors in files of strangers."""

import time

import pytest

from jaxmodels.convert.hf.names import check_no_adapter


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
