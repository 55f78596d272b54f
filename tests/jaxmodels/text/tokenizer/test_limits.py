"""Tokenizers whose rules would multiply a text, or take forever, are refused before a text is encoded."""

import json
import os
import time

import pytest

from jaxmodels.text.tokenizer import limits
from jaxmodels.text.tokenizer.errors import refusing
from jaxmodels.text.tokenizer.files import TokenizerFile
from jaxmodels.text.tokenizer.untrusted.plain import simple_steps

MODEL = {"type": "BPE", "vocab": {"a": 0, "b": 1, " ": 2}, "merges": []}


def replace(old: str, new: str, kind: str = "String") -> dict:
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def sequence(name: str, *steps: dict) -> dict:
    return {"type": "Sequence", name: list(steps)}


def template(*pieces: dict, ids: int = 1) -> dict:
    special = {"b": {"id": "b", "ids": [1] * ids, "tokens": ["b"] * ids}}
    return {
        "type": "TemplateProcessing",
        "single": list(pieces),
        "pair": [text("A"), text("B")],
        "special_tokens": special,
    }


def text(name: str) -> dict:
    return {"Sequence": {"id": name, "type_id": 0}}


def added(content: str, *, normalized: bool = False) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return flags | {"id": 3, "content": content, "normalized": normalized, "special": not normalized}


def tokenizer(**parts: object) -> TokenizerFile:
    return TokenizerFile(json.dumps({"version": "1.0", "model": MODEL, **parts}))


DOUBLE = replace("a", "aa")
UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["a" * 600, -1.0], ["a", -1.0]]}
SWELLS = {
    "a letter becomes many": ({"normalizer": replace("a", "a" * 10**6)}, "normalizer may make 1000000"),
    "doubled again and again": ({"normalizer": sequence("normalizers", *[DOUBLE] * 40)}, "may make 1099511627776"),
    "nested": ({"normalizer": sequence("normalizers", *[sequence("normalizers", *[DOUBLE] * 3)] * 5)}, "32768"),
    "by an expression": ({"normalizer": sequence("normalizers", *[replace("[ab]", "aba", "Regex")] * 9)}, "19683"),
    "between characters": ({"normalizer": sequence("normalizers", *[replace("(?=a)", "a", "Regex")] * 9)}, "512"),
    "other rules between": (
        {"normalizer": sequence("normalizers", replace("a", "AAAA" * 4), {"type": "Lowercase"}, replace("a", "b" * 9))},
        "144",
    ),
    "what is put before": (
        {"normalizer": sequence("normalizers", {"type": "Prepend", "prepend": "a" * 10**6})},
        "1000000",
    ),
    "decoded": ({"decoder": sequence("decoders", *[DOUBLE] * 40)}, "decoder may make"),
    "many steps": ({"pre_tokenizer": sequence("pretokenizers", *[{"type": "WhitespaceSplit"}] * 300)}, "300 steps"),
    "repeated by a template": ({"post_processor": template(text("A"), text("A"))}, "repeats the text A"),
    "an unknown special token": (
        {"post_processor": template({"SpecialToken": {"id": "x", "type_id": 0}}, text("A"))},
        "special token 'x' without ids",
    ),
    "a special token of many": ({"post_processor": template(text("A"), ids=2_000)}, "2,000 ids"),
    "a long token": ({"model": {**MODEL, "vocab": {"a" * 60_000: 0}}}, "a token of 60,000"),
    "a long unknown token": (
        {"model": {**MODEL, "vocab": {"a" * 101: 0}, "unk_token": "a" * 101}},
        "unk_token has 101",
    ),
    "long pieces": ({"model": UNIGRAM}, "a token of 600"),
    "long words": (
        {
            "model": {"type": "WordPiece", "unk_token": "a", "vocab": {"a": 0}, "continuing_subword_prefix": "##"}
            | {"max_input_chars_per_word": 10**9}
        },
        "max_input_chars_per_word=1000000000",
    ),
    "a long prefix": ({"model": {**MODEL, "continuing_subword_prefix": "#" * 1_000}}, "prefix has 1,000"),
    "tokens of a template": (
        {"post_processor": template(*[{"SpecialToken": {"id": "b", "type_id": 0}}] * 999, text("A"))},
        "adds 999 special tokens",
    ),
    "tokens of many templates": (
        {
            "post_processor": sequence(
                "processors", *[template({"SpecialToken": {"id": "b", "type_id": 0}}, text("A"))] * 70
            )
        },
        "adds 70 special tokens",
    ),
    "many beginnings": (
        {"model": {"type": "Unigram", "unk_id": 0, "vocab": [[f"{i:05}" + "a" * 121, -1.0] for i in range(20_000)]}},
        "2,442,222 different beginnings; at most 1,800,000",
    ),
    "pieces of a model without a type": ({"model": {"unk_id": 0, "vocab": [["a" * 600, -1.0]]}}, "at most 512"),
    "long added tokens": (
        {"added_tokens": [added(f"{i:02}" * 24_500) for i in range(41)]},
        "added tokens may have 2,009,000 bytes",
    ),
    "added tokens that grow": (
        {"added_tokens": [added("\ufdfa" * 40_000, normalized=True)], "normalizer": {"type": "NFKC"}},
        "2,160,000 bytes",
    ),
    "a long expression": ({"pre_tokenizer": split("a|" * 10_000 + "b")}, "20,001 characters"),
}


@pytest.mark.parametrize("what", SWELLS)
def test_it_is_refused_in_a_moment(what, capfd):
    parts, said = SWELLS[what]
    vocabulary, began = tokenizer(**parts), time.process_time()
    with pytest.raises(ValueError, match=said) as refused:
        len(vocabulary)
    assert time.process_time() - began < 4
    assert str(refused.value).startswith("not a tokenizer.json: ")
    assert "\n" not in str(refused.value)
    assert capfd.readouterr() == ("", "")  # not the lines of a Rust panic


SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
PUBLISHED = {
    "gpt-4": rf"{SHORT}|{BEFORE}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{REST}",
    "gpt-4o": rf"{BEFORE}{UPPER}*{LOWER}+{SHORT}?|{BEFORE}{UPPER}+{LOWER}*{SHORT}?|\p{{N}}{{1,3}}|"
    rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{REST}",
    "words of several": rf"{BEFORE}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|"
    rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{REST}",
    "digits from the right": r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))|\p{L}+|\s+|[^\s\p{L}\p{N}]+",
    "Han": r"[\p{Han}]+|[\p{L}&&[^\p{Han}]]+|\s+|[^\s\p{L}]+",
}


def test_many_pieces_with_the_same_beginnings_pass():
    pieces = [[("a" * 120 + f"{i:05}")[-126:], -1.0] for i in range(20_000)]
    assert len(tokenizer(model={"type": "Unigram", "unk_id": 0, "vocab": pieces})) == 20_000


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_expressions_pass(name):
    assert len(tokenizer(pre_tokenizer=split(PUBLISHED[name]))) == 3


def test_published_rules_pass():
    rules = [replace(c, f"<{name}>") for c, name in (("\n", "newline"), ("\t", "tab"), ("№", "number"), ("½", "half"))]
    rules += [{"type": "NFKC"}, replace(r" {2,}", " ", "Regex"), replace(r"\s+$", " ", "Regex"), replace("``", '"')]
    rules += [{"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")]
    assert limits.grows(rules) <= 16
    assert len(tokenizer(normalizer=sequence("normalizers", *rules), post_processor=template(text("A")))) == 3
    assert limits.grows([replace(c, c.upper() * 3) for c in "abcdefghij"]) == 3  # none sees what another has written


def test_standard_error_is_kept_unless_rust_panics(capfd):
    class PanicException(BaseException):
        pass

    with refusing("what", silent=True):
        os.write(2, b"kept\n")
        with refusing("what", silent=True):
            os.write(2, b"too\n")
    assert capfd.readouterr().err == "kept\ntoo\n"

    def panicking():
        with refusing("what", silent=True):
            os.write(2, b"thread panicked\n")
            raise PanicException("why\nnote: more")

    with pytest.raises(ValueError, match="what: why"):
        panicking()
    os.write(2, b"later\n")
    assert capfd.readouterr().err == "later\n"
    with pytest.raises(KeyboardInterrupt), refusing("what", silent=True):
        raise KeyboardInterrupt


@pytest.mark.parametrize("inner", [{"type": "WhitespaceSplit"}, {"type": "Sequence", "pretokenizers": []}, 5], ids=str)
def test_a_million_steps_are_counted_at_once(inner):
    content = {"pre_tokenizer": sequence("pretokenizers", *[inner] * 10**6)}
    began = time.process_time()
    found = list(limits.steps(content["pre_tokenizer"]))
    assert len(found) == (10**6 if inner == {"type": "WhitespaceSplit"} else 0)
    simple_steps(content["pre_tokenizer"])
    assert time.process_time() - began < 5
