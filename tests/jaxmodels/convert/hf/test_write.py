"""Folders as they are written: transformers loads them without a word, in the original's dtype."""

import json
import logging

import numpy as np
import pytest
import torch
import transformers

from jaxmodels.convert.flax import open_flax, write_flax
from jaxmodels.convert.hf import open_hf, write_hf
from jaxmodels.convert.neox.read import open_neox
from jaxmodels.convert.neox.write import write_neox
from tests.jaxmodels.convert.hf.folders import buffers, model, published, write_bin, write_config, write_shards


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("through", ["hf", "neox", "flax"])
def test_transformers_loads_what_came_through_another_format(tmp_path, caplog, dtype, through):
    made = model(dtype)
    write_config(tmp_path / "given", made)
    write_shards(tmp_path / "given", published(made) | buffers(), "bin")
    source = open_hf(tmp_path / "given")
    if through == "neox":
        write_neox(source, tmp_path / "middle", 3)
        source = open_neox(tmp_path / "middle")
    elif through == "flax":
        write_flax(source, tmp_path / "middle")
        source = open_flax(tmp_path / "middle")
    write_hf(source, tmp_path / "out", file_bytes=50_000)
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["dtype"] == content["torch_dtype"] == str(dtype).removeprefix("torch.")
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        theirs, info = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    finally:
        library.removeHandler(caplog.handler)
    assert not any(info.values()), info
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert theirs.dtype == dtype
    for name, tensor in made.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name


def test_a_mix_of_dtypes_is_written_as_it_is(tmp_path):
    made = model(torch.float16)
    write_config(tmp_path / "given", made)
    state = {name: tensor.float() if tensor.ndim == 1 else tensor for name, tensor in published(made).items()}
    write_bin(tmp_path / "given", state)
    write_hf(open_hf(tmp_path / "given"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    found = {key: np.dtype(tensor.dtype).name for key, tensor in open_hf(tmp_path / "out").tensors.items()}
    assert {name for key, name in found.items() if "bias" in key} == {"float32"}
    assert found["embedding.emb.weight"] == "float16"


def test_a_tied_model_has_one_table(tmp_path):
    made = model(tie_word_embeddings=True)
    write_config(tmp_path / "given", made)
    write_bin(tmp_path / "given", published(made))
    write_hf(open_hf(tmp_path / "given"), tmp_path / "out")
    theirs, info = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.lm_head.weight is theirs.gpt_neox.embed_in.weight
    assert torch.equal(theirs.lm_head.weight, made.lm_head.weight)
