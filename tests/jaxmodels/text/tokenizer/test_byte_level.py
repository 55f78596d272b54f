"""A vocab.json with its merges.txt, and settings beside a tokenizer.json, compared with transformers."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from jaxmodels.text import TokenizerFile
from tests.jaxmodels.tokenizer import byte_level_tokenizer

END = "<|endoftext|>"
TEXTS = ("the e\u0301 or", "\u212b \ufb01 A\u030a", f"{END}the", "the  one\n\n<|im_end|> not , <|padding|>", "")
DECODER = {"0": {"content": END, "special": True}, "300": {"content": " the", "normalized": False}}
SPACES = "clean_up_tokenization_spaces"
SETTINGS = {
    "none": {},
    "a prefix": {"add_prefix_space": True},
    "begins": {"add_bos_token": True},
    "begins and ends": {"add_bos_token": True, "add_eos_token": True, "eos_token": "the"},
    "begins with none": {"add_bos_token": True, "bos_token": None},
    "a pad token": {"pad_token": "<|im_end|>"},
    "an unknown pad token": {"pad_token": "<|pad|>"},
    "extra tokens": {"additional_special_tokens": ["<|im_end|>"]},
    "added tokens": {"added_tokens_decoder": DECODER},
    "cleaned texts": {SPACES: True, f"{SPACES}_for_bpe_even_though_it_will_corrupt_output": True},
}


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path):
    byte_level_tokenizer().model.save(str(tmp_path))
    write(tmp_path, "config.json", {"model_type": "gpt_neox"})
    return tmp_path


@pytest.mark.parametrize(
    "kind", ["GPTNeoXTokenizerFast", "GPTNeoXTokenizer", "GPT2Tokenizer", "GPT2TokenizerFast", None]
)
@pytest.mark.parametrize("name", SETTINGS)
def test_ids_are_those_of_transformers(folder, name, kind):
    write(folder, "tokenizer_config.json", SETTINGS[name] | ({"tokenizer_class": kind} if kind else {}))
    ours, theirs = TokenizerFile.read(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, special=True).tolist() == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text))
    assert len(ours) == len(theirs)


def test_a_name_in_bars_is_special_only_if_a_file_says_so(folder):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    write(folder, "vocab.json", vocabulary | {"<|im_end|>": len(vocabulary)})
    ours, theirs = TokenizerFile.read(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.encode("<|im_end|>").tolist() == theirs.encode("<|im_end|>")
    assert len(ours.encode("<|im_end|>")) > 1
    write(folder, "special_tokens_map.json", {"pad_token": {"content": "<|im_end|>", "lstrip": False}})
    theirs = AutoTokenizer.from_pretrained(folder)
    assert TokenizerFile.read(folder).encode("a<|im_end|>").tolist() == theirs.encode("a<|im_end|>")
    assert TokenizerFile.read(folder).encode("<|im_end|>").tolist() == [len(vocabulary)]


def test_a_model_of_this_project_has_the_tokenizer_of_gpt_neox(folder):
    expected = TokenizerFile.read(folder).encode(TEXTS[0])
    write(folder, "config.json", {"model": "NeoX"})
    assert TokenizerFile.read(folder).encode(TEXTS[0]).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, "tokenizer_class='PreTrainedTokenizerFast'"),
        ({"tokenizer_class": "RobertaTokenizer"}, "tokenizer_class='RobertaTokenizer'"),
        ({"tokenizer_class": 5}, "tokenizer_class=5"),
        ({"add_prefix_space": "x"}, "add_prefix_space='x'"),
        ({"add_bos_token": 1}, "add_bos_token=1"),
        ({"extra_special_tokens": {"image_token": 5}}, "image_token=5"),
        ({"additional_special_tokens": [5]}, "additional_special_tokens=5"),
        ({"model_specific_special_tokens": ["<x>"]}, "model_specific_special_tokens=.*<x>"),
        ({"model_specific_special_tokens": {"x": 5}}, "x=5"),
    ],
)
def test_other_settings_are_refused(folder, settings, said):
    write(folder, "tokenizer_config.json", settings)
    with pytest.raises(ValueError, match=said):
        TokenizerFile.read(folder)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"add_prefix_space": True}, "add_prefix_space=True.*False"),
        ({"added_tokens_decoder": {"0": DECODER["0"], "302": DECODER["300"]}}, "' the' with the id 302"),
        ({"added_tokens_decoder": {"7": DECODER["0"]}}, r"'<\|endoftext\|>' with the id 7"),
        ({"split_special_tokens": True}, "split_special_tokens=True"),
    ],
)
def test_settings_that_contradict_a_tokenizer_json_are_refused(tmp_path, settings, said):
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", settings | {"tokenizer_class": "GPTNeoXTokenizer"})
    for given in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(ValueError, match=said):
            TokenizerFile.read(given)
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "GPTNeoXTokenizer", "add_prefix_space": False})
    assert TokenizerFile.read(tmp_path).encode("the").tolist() == byte_level_tokenizer().encode("the").ids
