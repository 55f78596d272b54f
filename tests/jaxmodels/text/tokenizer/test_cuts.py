"""Cuts of a text between pieces: the ids of the pieces are those of the whole text, whatever the tokenizer."""

import base64
import itertools
import json
import random
import struct
import time
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxmodels.process.confined import Child
from jaxmodels.text import ByteVocabulary, CharVocabulary, TokenizerFile, Vocabulary
from jaxmodels.text.documents import Text
from jaxmodels.text.pieces import pieces
from jaxmodels.text.tokenizer.patterns import Pattern, Unsupported, parsed
from tests.jaxmodels.text.tokenizers import GPT2, LLAMA3, MAKERS, UNCUT, made

# Normalizer that replaces nothing: a tree without entries, and texts that no entry names.
MAP = base64.b64encode(struct.pack("<I", 1024) + bytes(1024) + b"a" * 10**6).decode()
ALPHABET = [*"aAbs tT12 . ,'\n\r\t-_<中日，。éﬁﾞİΣßก", "  ", "\r\n", "\n\n", " the", "'s", " of", "is", "the language"]
ALPHABET += [
    " <mask> ",
    "Class ",
    "<|endoftext|>",
    "e\u0301",
    "한",
    "\u1161",
    "\u0e33",
    " \u0301",
    "👩‍👧",
    "\u00a0",
    "</s>",
]
ALPHABET += ["[INST] ", " [/INST]", "[PAD]", "]", "ı", "ß", "½", "²"]
ALPHABET += ["[MASK]", "<unk>", "word", "``", "''", "▁", "▁▁"]


def text(rng: random.Random, longest: int) -> str:
    return "".join(rng.choice(ALPHABET) for _ in range(rng.randint(1, longest)))


def ids(vocabulary: Vocabulary, texts: list[str]) -> list[list[int]]:
    return [vocabulary.ids_of(found).tolist() for found in vocabulary.encode_batch(texts)]


@pytest.mark.parametrize("name", MAKERS)
def test_every_cut_keeps_the_ids(name):
    vocabulary, rng = TokenizerFile(made(name).to_str()), random.Random(0)
    cuts, checked = vocabulary.cuts, []
    assert cuts.reason is None
    for _ in range(130):
        whole = text(rng, 23)
        places = [i for i in range(1, len(whole)) if cuts.last(whole, i - 1, i) == i]
        checked += [(whole, whole[:i], whole[i + cuts.dropped :]) for i in places]
    assert len(checked) > 30
    found = ids(vocabulary, [part for parts in checked for part in parts])
    for i, parts in enumerate(checked):
        whole_ids, left, right = found[3 * i : 3 * i + 3]
        assert left + right == whole_ids, parts


@pytest.mark.parametrize("name", [*MAKERS, "characters of ours", "bytes"])
def test_pieces_of_any_size_have_the_ids_of_the_text(name):
    rng = random.Random(1)
    whole = "".join(text(rng, 23) for _ in range(41))
    ours: dict[str, Vocabulary] = {"characters of ours": CharVocabulary.of(whole), "bytes": ByteVocabulary()}
    vocabulary = ours.get(name) or TokenizerFile(made(name).to_str())
    for size in (1, 3, 31, 211, rng.randint(4, 97)):
        found = list(pieces(Text("text", whole), vocabulary.cuts, size=size))
        assert len(found) > 1
        assert [piece.ends for piece in found] == [False] * (len(found) - 1) + [True]
        joined = itertools.chain.from_iterable(ids(vocabulary, [piece.text for piece in found]))
        assert list(joined) == vocabulary.encode(whole).tolist(), size


def test_pieces_are_about_as_long_as_asked():
    vocabulary = TokenizerFile(made("pythia").to_str())
    found = list(pieces(Text("text", "some words and more of them. " * 500), vocabulary.cuts, size=200))
    assert max(len(piece.text) for piece in found) <= 200
    assert min(len(piece.text) for piece in found[:-1]) > 150


@pytest.mark.parametrize("name", UNCUT)
def test_a_text_that_cannot_be_cut_is_encoded_whole_or_refused(name, monkeypatch):
    vocabulary = TokenizerFile(made(name).to_str())
    assert vocabulary.cuts.reason is not None
    assert [piece.text for piece in pieces(Text("text", "a word " * 50), vocabulary.cuts, size=3)] == ["a word " * 50]
    monkeypatch.setattr("jaxmodels.text.pieces.LONGEST", 100)
    with pytest.raises(ValueError, match=r"story.txt has 100 characters .*its (model|regular expression)"):
        list(pieces(Text("story.txt", "a word " * 50), vocabulary.cuts, size=3))


def test_a_text_without_a_place_is_refused(monkeypatch):
    monkeypatch.setattr("jaxmodels.text.pieces.LONGEST", 1000)
    vocabulary = TokenizerFile(made("bert").to_str())
    with pytest.raises(ValueError, match=r"genome has 1,000 characters"):
        list(pieces(Text("genome", "ACGT" * 500), vocabulary.cuts, size=100))
    found = list(pieces(Text("genome", "ACGT" * 200 + " " + "ACGT" * 200), vocabulary.cuts, size=100))
    assert [len(piece.text) for piece in found] == [800, 801]


@pytest.mark.parametrize(
    ("pattern", "before", "after", "may"),
    [
        (GPT2, "a", " ", True),
        (GPT2, " ", "a", False),  # the space belongs to the word
        (GPT2, "'", "s", False),
        (GPT2, ".", "\n", True),
        (LLAMA3, ".", "\n", False),  # ends of lines belong to punctuation before them
        (LLAMA3, ".", " ", True),
        (LLAMA3, "'", "S", False),
        (LLAMA3, "中", "。", True),
        (r"a(?=b)", "a", "b", False),
        (r"a(?!b)|a", "a", "c", True),
        (r"(?:ab)+", "b", "a", False),
        (r"a{2,}", "a", "a", False),
        (r"[^\s[ab]]+", "c", "a", True),
        (r"\w++", "a", "-", True),
        (r"x(?:y(?=.{2}))", "y", "z", False),
    ],
)
def test_patterns(pattern, before, after, may):
    assert Pattern(pattern).may_cut(before, after) is may


def test_a_character_is_sure_to_be_in_a_match():
    assert Pattern(GPT2).always_matches("a")
    assert Pattern(GPT2).always_matches(" ")
    assert not Pattern(r"\s+(?!\S)").always_matches(" ")
    assert not Pattern(r" {2,}").always_matches(" ")
    assert not Pattern(r"(?>a*)a").always_matches("a")
    assert Pattern(r"(?i:k)").always_matches("K")


@pytest.mark.parametrize(
    "pattern",
    [r"(?<=a)b", r"\bword", "^a", "a$", r"(a)\1", "[a", "(a", "a)", r"\p{Han}", "[a&&b]", "a*", "", "a**", r"\X"],
)
def test_other_patterns_are_not_supported(pattern):
    with pytest.raises(Unsupported):
        Pattern(pattern)


def test_rules_that_make_many_characters_of_one_take_no_minutes():
    """Each rule may or may not change the character on one side: two, four, … pairs of one."""
    rules = []
    for i in range(120):
        for pattern in (r"z\p{L}", r"z[\p{L}.]"):
            rules.append({"type": "Replace", "pattern": {"Regex": pattern}, "content": chr(0x3041 + i % 80)})
    content = json.dumps(
        {
            "version": "1.0",
            "normalizer": {"type": "Sequence", "normalizers": rules},
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
        }
    )
    few = json.loads(content)
    few["normalizer"]["normalizers"] = rules[:30]
    for one in (content, json.dumps(few)):
        began = time.process_time()
        cuts = TokenizerFile(one).cuts
        found = [cuts.last(f"{c}{after}{c}", 0, 3) for c in map(chr, range(0x4E00, 0x5E00)) for after in " .,"]
        assert found == [None] * len(found)
        assert time.process_time() - began < 5


def test_a_normalizer_of_megabytes_is_not_sent_for_each_pair_of_characters(monkeypatch):
    """The process of a confined tokenizer has it already."""
    sent = []

    def counted(self: Child, request: bytes) -> Any:
        sent.append(len(request))
        return exchange(self, request)

    exchange = Child.exchange
    monkeypatch.setattr(Child, "exchange", counted)
    steps = [
        {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        {"type": "Precompiled", "precompiled_charsmap": MAP},
    ]
    content = {
        "version": "1.0",
        "normalizer": {"type": "Sequence", "normalizers": [*steps, {"type": "Lowercase"}]},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
    }
    vocabulary = TokenizerFile(json.dumps(content))
    assert vocabulary.normalize(0, 3, ["Ab\u212b"]) == ["ab\u00e5"]
    assert vocabulary.normalize(2, 3, ["Ab"]) == ["ab"]
    assert vocabulary.normalize(1, 2, ["Ab"]) == ["Ab"]
    assert [vocabulary.cuts.separate(chr(c), " ") for c in range(0x4E00, 0x4E40)] == [True] * 64
    first, *others = sent
    assert first > len(MAP)
    assert len(others) > 64
    assert max(others) < 200


def test_a_letter_number_is_beside_no_cut():
    """The tokenizers package takes Ⅷ for a part of a word, with the _ after it; Python's categories do not say so."""
    found = models.WordLevel({"[UNK]": 0, "\u2167_": 1, "\u2167": 2, "_": 3, "a": 4}, unk_token="[UNK]")
    tokenizer = Tokenizer(found)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    vocabulary = TokenizerFile(tokenizer.to_str())
    assert not vocabulary.cuts.separate("\u2167", "_")
    assert vocabulary.cuts.separate("a", " ")


def test_a_merge_with_an_empty_token_is_no_error():
    model = {"type": "BPE", "vocab": {"": 0, "a": 1, "b": 2, "ab": 3}, "merges": [["", "a"], ["a", "b"]]}
    vocabulary = TokenizerFile(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    assert vocabulary.cuts.reason is not None
    assert vocabulary.encode("ab").tolist() == [3]


def test_no_cut_is_between_an_added_token_and_a_space_that_is_prepended():
    """A text behind an added token has the space and what is prepended; a piece would have one of them."""
    cuts = TokenizerFile(made("llama2 with instructions").to_str()).cuts
    assert not cuts.separate("]", " ")
    assert cuts.separate("e", " ")


def constructed(model: dict[str, Any], **parts: Any) -> TokenizerFile:
    return TokenizerFile(json.dumps({"version": "1.0", "added_tokens": [], "model": model, **parts}))


def test_a_prefix_is_looked_for_as_earlier_pre_tokenizers_leave_the_space():
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    vocab = {c: i for i, c in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "▁"])}
    pre_tokenizer = {"type": "Sequence", "pretokenizers": [level, metaspace]}
    vocabulary = constructed({"type": "BPE", "vocab": vocab, "merges": []}, pre_tokenizer=pre_tokenizer)
    whole = "the model of text\n" * 29
    joined = [piece.text for piece in pieces(Text("text", whole), vocabulary.cuts, size=7)]
    assert [i for found in ids(vocabulary, joined) for i in found] == vocabulary.encode(whole).tolist()


@pytest.mark.parametrize(
    ("pattern", "before"),
    [
        (r"(?i:[a-z]+)", "ı"),
        (r"(?i:[a-z]+)", "\u212a"),
        (r"(?i:ss)", "ß"),
        (r"(?i:fi)", "ﬁ"),
        (r"\w+", "½"),
        (r"\W", "²"),
    ],
)
def test_a_character_on_which_libraries_differ_is_beside_no_cut(pattern, before):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    model = {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"}
    assert not constructed(model, pre_tokenizer=split).cuts.separate(before, ".")


def test_letters_of_other_alphabets_have_two_cases():
    assert parsed("(?i:ж)").may_cut("Ж", " ")
    assert parsed("(?i:ж)").touches("Ж")
    assert not parsed("(?i:ж)").touches("s")
