"""Tokenizers that are known to be harmless work in this process, all others in a confined one, with equal results."""

import contextlib
import copy
import json
import pickle

import numpy as np
import pytest

from jaxmodels.text import TokenizerFile
from jaxmodels.text.tokenizer.limits import check
from jaxmodels.text.tokenizer.untrusted.plain import is_plain
from tests.jaxmodels.text.tokenizers import DEEPSEEK, MAKERS, SPICE, UNCUT, made

MODEL = {"type": "BPE", "vocab": {"a": 0, "b": 1, " ": 2, "-": 3}, "merges": []}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def plain(**parts: object) -> bool:
    return is_plain(check(json.dumps({"version": "1.0", "model": MODEL, **parts})))


def split(pattern: str, kind: str = "Regex") -> dict:
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": "Isolated", "invert": False}


def replace(pattern: str, content: str = "b", kind: str = "Regex") -> dict:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def sequence(name: str, *steps: object) -> dict:
    return {"type": "Sequence", name: list(steps)}


@pytest.mark.parametrize("name", [*MAKERS, *UNCUT])
def test_tokenizers_as_published_ones_are_plain(name):
    content = made(name).to_str()
    words = any(token["single_word"] for token in json.loads(content)["added_tokens"])
    assert is_plain(check(content)) is not (name == "look behind" or words)


@pytest.mark.parametrize("pattern", [r"\s+", " {2,}", r"\p{N}{1,3}", r"\d", "[0-9]+", r"[^\s]", "-", *DEEPSEEK])
def test_expressions_of_one_class_are_plain(pattern):
    assert plain(pre_tokenizer=split(pattern))
    assert plain(normalizer=replace(pattern))


def template(single: str, pair: str) -> dict:
    texts = [[{"Sequence": {"id": text, "type_id": 0}} for text in texts] for texts in (single, pair)]
    return {"type": "TemplateProcessing", "single": texts[0], "pair": texts[1], "special_tokens": {}}


UNKNOWN = {
    "a template of the second text": {"post_processor": template("B", "")},
    "a template of both texts for one": {"post_processor": template("AB", "AB")},
    "a template without a text": {"post_processor": template("", "AB")},
    "a template of one text for both": {"post_processor": template("A", "A")},
    "a template of a sequence": {"post_processor": sequence("processors", template("B", "AB"))},
    "a template in words": {"post_processor": {"type": "TemplateProcessing", "single": "$A", "pair": "$A $B"}},
    "a merge without its result": {"model": MODEL | {"merges": [["a", "b"]]}},
    "a merge of three": {"model": MODEL | {"merges": ["a b -"]}},
    "a prefix of subwords": {"model": MODEL | {"continuing_subword_prefix": "#"}},
    "another expression": {"pre_tokenizer": split(r"(?:-|-){22}~|-")},
    "one that looks to the end": {"normalizer": replace(r"\s+$")},
    "in a sequence": {"pre_tokenizer": sequence("pretokenizers", LEVEL, split("a*b"))},
    "in a decoder": {"decoder": replace("a*b")},
    "an empty string": {"normalizer": replace("", kind="String")},
    "a long string": {"normalizer": replace("a" * 101, kind="String")},
    "growth by Unicode and a rule": {"normalizer": sequence("normalizers", {"type": "NFKC"}, replace("ل", "abcde"))},
    "bytes of bytes": {"pre_tokenizer": sequence("pretokenizers", LEVEL, LEVEL)},
    "many steps": {"pre_tokenizer": sequence("pretokenizers", *[{"type": "Whitespace"}] * 17)},
    "a table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "a kind of another version": {"normalizer": {"type": "Later"}},
    "no kind": {"normalizer": {"strip_left": True, "strip_right": True}},
    "a list for an object": {"normalizer": ["NFC"]},
    "a list in a sequence": {"normalizer": sequence("normalizers", ["NFC"])},
    "both ends of a token": {"decoder": {"type": "Strip", "content": " ", "start": 1, "stop": 1}},
    "a token that is stripped": {
        "normalizer": {"type": "Strip", "strip_left": True, "strip_right": True},
        "added_tokens": [{"id": 0, "content": " ", "single_word": False, "normalized": True}],
    },
    "a token that is replaced": {
        "normalizer": replace("a", "", "String"),
        "added_tokens": [{"id": 0, "content": "a", "single_word": False, "normalized": True}],
    },
    "offsets outside of the text": {"normalizer": {"type": "Prepend", "prepend": "aa"}, "post_processor": LEVEL},
    "a form of what was prepended": {
        "normalizer": sequence("normalizers", {"type": "Prepend", "prepend": "é"}, {"type": "NFD"})
    },
    "an empty suffix": {"decoder": {"type": "BPEDecoder", "suffix": ""}},
    "pieces of any length": {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a" * 200, -1.0]]}},
    "words of any length": {"model": {"type": "WordPiece", "vocab": {"a": 0}, "max_input_chars_per_word": 500}},
    "no model's kind": {"model": {"vocab": {"a": 0}, "merges": []}},
    "whole words": {"added_tokens": [{"id": 0, "content": "a", "single_word": True}]},
    "a letter that strips": {"added_tokens": [{"id": 0, "content": "a", "single_word": False, "lstrip": True}]},
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_anything_else_is_not(what):
    assert not plain(**UNKNOWN[what])


@pytest.mark.parametrize("text", ["B", ""])
def test_a_template_that_panics_prints_nothing(text, capfd):
    vocabulary = TokenizerFile(json.dumps({"version": "1.0", "model": MODEL, "post_processor": template(text, "")}))
    with contextlib.suppress(ValueError):
        vocabulary.encode_prompt("ab")
    assert capfd.readouterr().err == ""
    assert plain(post_processor=template("A", "AB"))


def test_a_name_twice_is_not():
    text = json.dumps({"model": MODEL, "normalizer": None})
    assert is_plain(check(text))
    assert not is_plain(check(text[:-1] + ', "normalizer": null}'))
    assert not is_plain(check(text.replace('"normalizer": null', '"normalizer": {"type": "Later", "type": "NFC"}')))


@pytest.mark.parametrize(
    "name", ["bert", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "llama2", "t5"))]
)
def test_a_confined_process_has_the_same_results(name):
    content = made(name).to_str()
    here, there = TokenizerFile(content), TokenizerFile(content.replace('"version"', '"version": "1.0", "version"', 1))
    assert (here.confined is None, there.confined is None) == (True, False)
    texts = [SPICE, "", "a b\n", "中文 \U0001f600"]
    for text in texts:
        ids = here.encode(text)
        np.testing.assert_array_equal(there.encode(text), ids)
        np.testing.assert_array_equal(there.encode(text, special=True), here.encode(text, special=True))
        np.testing.assert_array_equal(there.encode_prompt(text), here.encode_prompt(text))
        assert there.encode(text).dtype == ids.dtype
        assert there.decode(ids) == here.decode(ids)
        assert there.unknown_in(text) == here.unknown_in(text)
    for ours, theirs in zip(here.encode_batch(texts), there.encode_batch(texts), strict=True):
        np.testing.assert_array_equal(here.ids_of(ours), there.ids_of(theirs))
    assert (here.cuts.reason, here.cuts.last(SPICE, 5, 60)) == (there.cuts.reason, there.cuts.last(SPICE, 5, 60))
    for other in (copy.deepcopy(there), pickle.loads(pickle.dumps(there))):
        np.testing.assert_array_equal(other.encode(SPICE), here.encode(SPICE))
