"""Text of streamed tokens: its pieces join to what the tokenizer decodes."""

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxmodels.generate.text import TextStream, continuation
from jaxmodels.text import END_OF_TEXT, ByteVocabulary, CharVocabulary, TokenizerFile
from tests.jaxmodels.tokenizer import byte_level_tokenizer


@pytest.fixture(scope="module")
def vocabulary():
    return TokenizerFile.of(byte_level_tokenizer())


@pytest.fixture(scope="module")
def chat():
    """With special tokens of a chat, and an added token that is none."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<extra é>", normalized=False)])
    return TokenizerFile.of(tokenizer)


@pytest.fixture(scope="module")
def metaspace():
    """As Llama has it: spaces as ▁, and characters outside the vocabulary as the bytes of their UTF-8."""
    words = ["▁", "▁the", "▁sea", "s", ",", "▁▁", "a", "é"]
    ids = {f"<0x{byte:02X}>": byte for byte in range(256)} | {word: 256 + i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=ids | {"<unk>": 300}, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return TokenizerFile.of(tokenizer)


def added(text, tokens):
    return [text.add(token) for token in tokens if not text.ended]


def test_text_comes_in_whole_characters(vocabulary):
    ids = vocabulary.encode("a – é€ b")
    parts = added(TextStream(vocabulary), ids)
    assert "".join(parts) == "a – é€ b"
    assert not any("\ufffd" in part for part in parts)
    assert "" in parts  # a character of several tokens came at its last


def test_a_text_that_ends_inside_a_character_shows_it(vocabulary):
    ids = vocabulary.encode("sea €")[:-1]
    stream = TextStream(vocabulary)
    assert "".join(added(stream, ids)) == "sea "
    assert stream.rest() == "\ufffd"
    assert continuation(TextStream(vocabulary), ids) == vocabulary.decode(ids) == "sea \ufffd"


def words(vocabulary, rng, n):
    """Ids that mix text in several scripts with random tokens, invalid ones included."""
    text = vocabulary.encode("the seas é€ 日本 👍🏽 ,  the") if not isinstance(vocabulary, CharVocabulary) else []
    noise = rng.integers(0, len(vocabulary), n)
    pick = rng.integers(0, 3, n)
    return np.asarray([noise[i] if not len(text) or pick[i] == 0 else text[i % len(text)] for i in range(n)])


@pytest.mark.parametrize("name", ["vocabulary", "chat", "metaspace", "bytes", "characters"])
def test_pieces_join_to_the_text_of_all_tokens(name, request):
    others = {"bytes": ByteVocabulary(), "characters": CharVocabulary("abcé 日👍")}
    vocabulary = others.get(name) or request.getfixturevalue(name)
    rng = np.random.default_rng(5)
    for length in range(60):
        ids = words(vocabulary, rng, length + 1)
        ids = [i for i in ids.tolist() if name != "metaspace" or i < 264]
        cut = int(rng.integers(0, len(ids) + 1)) if name in ("chat", "vocabulary") else 0
        prompt, new = ids[:cut], ids[cut:]
        whole, before = (vocabulary.decode(part, skip_special=True) for part in (ids, prompt))
        found = continuation(TextStream(vocabulary, prompt), new)
        if whole.startswith(before):
            assert found == whole[len(before) :]
        else:  # the prompt ended inside a character, which the first tokens completed
            assert whole.startswith(before.rstrip("\ufffd"))
            assert whole.endswith(found)


def test_a_word_after_the_prompt_keeps_its_space(metaspace):
    assert metaspace.decode([257]) == "the"
    stream = TextStream(metaspace, [257])
    assert added(stream, [258, 259, 256, 256, 258]) == [" sea", "s", " ", " ", " sea"]


def test_bytes_of_byte_fallback_come_together(metaspace):
    stream = TextStream(metaspace, [257])
    assert added(stream, [0xE2, 0x82, 0xAC, 259]) == ["", "", "", "€s"]
    stream = TextStream(metaspace, [257])
    assert added(stream, [0xE2, 0x82, 259]) == ["", "", "\ufffd\ufffds"]


def test_special_tokens_are_left_out(chat):
    ids = chat.encode("<|im_start|>sea<|im_end|><extra é> a")
    assert chat.decode(ids) == "<|im_start|>sea<|im_end|><extra é> a"
    assert continuation(TextStream(chat), ids) == "sea<extra é> a"


@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        ("<|im_end|>", "sea<|im_end|> more", "sea"),
        ("a<|im_end|>", "sea<|im_end|> more", "se"),
        ("<|im_end|>\n", "sea<|im_end|> <|im_end|>\nmore", "sea "),
        ("never<|im_end|>", "sea<|im_end|> nev", "sea nev"),
    ],
)
def test_stop_texts_match_special_tokens(chat, stop, text, expected):
    stream = TextStream(chat, stops=[stop])
    assert continuation(stream, chat.encode(text)) == expected
    assert stream.ended == (stop in text)


def test_what_may_become_a_stop_text_is_held_back(vocabulary):
    ids = vocabulary.encode("abababac")
    text = TextStream(vocabulary, stops=["abac"])
    assert "".join(added(text, ids)) == "abab"
    assert text.ended
    text = TextStream(vocabulary, stops=["abac"])
    shown = "".join(added(text, ids[:-1]))
    assert (shown + text.rest()) == vocabulary.decode(ids[:-1])
    assert not text.ended
    text = TextStream(vocabulary, stops=["xyz"])
    assert "".join(added(text, vocabulary.encode("ab xy"))) == "ab "
    assert text.rest() == "xy"


def test_the_first_of_several_stop_texts_counts(vocabulary):
    text = TextStream(vocabulary, stops=["cd", "bc"])
    assert "".join(added(text, vocabulary.encode("abcd"))) == "a"


def test_an_end_token_ends_it(vocabulary):
    end = vocabulary.tokenizer.token_to_id(END_OF_TEXT)
    text = TextStream(vocabulary, end_tokens=[end])
    assert added(text, [*vocabulary.encode("ab"), end])[-1] == ""
    assert text.ended
    ids = [*vocabulary.encode("€")[:-1], end, *vocabulary.encode("more")]
    assert continuation(TextStream(vocabulary, end_tokens=[end]), ids) == "\ufffd"


def test_templates_of_special_tokens_are_for_prompts(chat):
    tokenizer = Tokenizer.from_str(chat.content)
    start, end = (tokenizer.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", start), ("<|im_end|>", end)]
    )
    vocabulary = TokenizerFile.of(tokenizer)
    plain = vocabulary.encode("sea <|im_start|>").tolist()
    assert plain == chat.encode("sea <|im_start|>").tolist()
    assert vocabulary.encode_prompt("sea <|im_start|>").tolist() == [start, *plain]
    assert chat.encode_prompt("sea").tolist() == chat.encode("sea").tolist()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert TokenizerFile.of(tokenizer).encode_prompt("sea")[0] == start


@pytest.mark.parametrize("name", ["newline", "no character", "spaces"])
def test_tokens_without_a_word_take_time_in_proportion_to_their_number(name, vocabulary, metaspace):
    of = metaspace if name == "spaces" else vocabulary
    piece = {"newline": vocabulary.encode("\n"), "no character": vocabulary.encode("é")[-1:], "spaces": [256]}[name]
    decoded: list[int] = []

    class Counting(TokenizerFile):
        def decode(self, ids, *, skip_special=False):
            decoded.append(len(ids))
            return super().decode(ids, skip_special=skip_special)

    ids = [*list(piece) * 3000, *of.encode("the sea").tolist(), *list(piece) * 700, *of.encode("s").tolist()]
    assert continuation(TextStream(Counting(of.content)), ids) == of.decode(ids)
    assert max(decoded) <= 513
