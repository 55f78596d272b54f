"""Settings beside a tokenizer.json, compared with transformers."""

import copy
import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer

from jaxmodels.generate.text import TextStream
from jaxmodels.text import TokenizerFile
from jaxmodels.text.tokenizer.untrusted import operations
from tests.jaxmodels.tokenizer import byte_level_tokenizer

END, IM = "<|endoftext|>", "<|im_end|>"
TEXTS = ("the e\u0301 or", f"{END}the", f"a   {IM}   b <|padding|> <pad> <extra>  y", " the 123")
BASE = json.loads(byte_level_tokenizer().to_str())
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
FIRST = PLAIN | {"content": END}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": END, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {END: {"id": END, "ids": [0], "tokens": [END]}},
}
KINDS = {
    "gpt_neox": {"tokenizer_class": "GPTNeoXTokenizer"},
    "gpt2": {"tokenizer_class": "GPT2TokenizerFast"},
    "mamba": {},
    "gpt_bigcode": {"tokenizer_class": "GPT2TokenizerFast"},
    "llama": {"tokenizer_class": "PreTrainedTokenizerFast"},
}


def with_token(**flags) -> dict:
    """A tokenizer.json with <|im_end|>, an added token if there are flags."""
    content = copy.deepcopy(BASE)
    content["model"]["vocab"][IM] = len(content["model"]["vocab"])
    if flags:
        content["added_tokens"].append(flags | {"content": IM, "id": content["model"]["vocab"][IM]})
    return content


SETTINGS = {
    "no settings": (BASE, {}),
    "a token of the vocabulary": (with_token(), {"pad_token": IM}),
    "a token that is not of the vocabulary": (BASE, {"pad_token": "<pad>", "additional_special_tokens": ["<extra>"]}),
    "an object": (BASE, {"mask_token": PLAIN | {"__type": "AddedToken", "content": "<pad>", "lstrip": True}}),
    "a named token": (BASE, {"extra_token": "<extra>"}),
    "named tokens": (BASE, {"model_specific_special_tokens": {"extra_token": "<extra>", "other": "<pad>"}}),
    "a named token with flags": (
        BASE,
        {"model_specific_special_tokens": {"x": PLAIN | {"__type": "AddedToken", "content": "<pad>", "lstrip": True}}},
    ),
    "named tokens that others replace": (
        BASE,
        {"model_specific_special_tokens": {"other": "<pad>"}, "extra_special_tokens": {"extra_token": "<extra>"}},
    ),
    "flags that are texts": (BASE, {"add_bos_token": " the", "add_eos_token": PLAIN | {"content": "<pad>"}}),
    "listed tokens by name": (BASE, {"additional_special_tokens": {"x_token": "<extra>"}}),
    "no named tokens": (BASE, {"model_specific_special_tokens": None, "extra_special_tokens": {}}),
    "a standard name": (BASE, {"model_specific_special_tokens": {"pad_token": "<pad>"}, "eos_token": "<extra>"}),
    "other flags": (
        with_token(**PLAIN),
        {"added_tokens_decoder": {0: FIRST, 300: FIRST | {"content": IM, "lstrip": True}}},
    ),
    "a token in the decoder alone": (BASE, {"added_tokens_decoder": {0: FIRST, 300: FIRST | {"content": "<extra>"}}}),
    "a template": (BASE | {"post_processor": TEMPLATE}, {}),
    "a normalizer": (BASE | {"normalizer": {"type": "NFC"}}, {}),
}


def write(folder, model: str, content: dict, settings: dict | None) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": model}))
    (folder / "tokenizer.json").write_text(json.dumps(content))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("model", KINDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_ids_are_those_of_transformers(tmp_path, name, model):
    content, settings = SETTINGS[name]
    write(tmp_path, model, content, KINDS[model] | settings)
    ours, theirs = TokenizerFile.read(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert len(ours) == len(theirs)
    for text in TEXTS:
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, special=True).tolist() == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text))


DECODERS = {
    "none": None,
    "other": {"type": "Fuse"},
    "of words": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    "of speech": {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
    "several": {
        "type": "Sequence",
        "decoders": [BASE["decoder"], {"type": "Strip", "content": "t", "start": 1, "stop": 0}],
    },
    "one of several": {"type": "Sequence", "decoders": [BASE["decoder"]]},
}


@pytest.mark.parametrize("model", [*KINDS, None])
@pytest.mark.parametrize("name", DECODERS)
def test_texts_are_those_of_transformers_whatever_the_decoder(tmp_path, name, model):
    write(tmp_path, model or "gpt_neox", BASE | {"decoder": DECODERS[name]}, KINDS[model] if model else None)
    ours, theirs = TokenizerFile.read(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the then, 12", " the\n\n über", "a"):
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)
        pieces = TextStream(ours, [])
        streamed = "".join(pieces.add(int(token)) for token in ids) + pieces.rest()
        assert streamed == theirs.decode(ids)


SPACES = "clean_up_tokenization_spaces"
CLEAN = {SPACES: True}
CLEANED = {
    "not said": {},
    "said": CLEAN,
    "for BPE": CLEAN | {f"{SPACES}_for_bpe_even_though_it_will_corrupt_output": True},
}
WORDS = ["the", "quick", "fox", ",", ".", "!", "?", "'", "n't", "'m", "'s", "'ve", "'re", "do", "it", "##ing", "n", "t"]
LEVELS = {
    "words": (models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="the"), None),
    "pieces": (
        models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="the"),
        decoders.WordPiece(cleanup=False),
    ),
    "Unigram": (models.Unigram([(f"\u2581{w}", -1.0) for w in WORDS], unk_id=0), decoders.Metaspace()),
    "BPE": (models.BPE({w: i for i, w in enumerate(WORDS)}, []), None),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", CLEANED)
def test_decoded_texts_lose_the_spaces_that_transformers_removes(tmp_path, name, level):
    model, decoder = LEVELS[level]
    tokenizer = Tokenizer(model)
    if decoder is not None:
        tokenizer.decoder = decoder
    content = json.loads(tokenizer.to_str())
    if level == "BPE":
        del content["model"]["type"]  # as in older files
    write(tmp_path, "llama", content, KINDS["llama"] | CLEANED[name])
    ours, theirs = TokenizerFile.read(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(7)
    for _ in range(50):
        ids = rng.choices(range(len(WORDS)), k=rng.randrange(11))
        assert ours.decode(ids) == theirs.decode(ids)
    cleans = name == "for BPE" or (name == "said" and level != "BPE")
    assert ours.decode([0, 3]) == ("the," if cleans else "the ,")


OTHERS = {
    "normalizer": {"normalizer": {"type": "NFKC"}},
    "pre_tokenizer": {"pre_tokenizer": {"type": "Whitespace"}},
    "model": {"model": BASE["model"] | {"ignore_merges": True}},
}


@pytest.mark.parametrize("part", OTHERS)
def test_rules_of_another_class_are_refused_and_how_to_keep_them_is_said(tmp_path, part):
    content = BASE | OTHERS[part]
    write(tmp_path, "gpt_neox", content, KINDS["gpt_neox"])
    with pytest.raises(ValueError, match=f"another {part} than GPTNeoXTokenizer.*PreTrainedTokenizerFast"):
        TokenizerFile.read(tmp_path)
    write(tmp_path, "gpt_neox", content, KINDS["llama"])
    ours, theirs = TokenizerFile.read(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert [ours.encode(text).tolist() for text in TEXTS] == [theirs.encode(text) for text in TEXTS]


def test_an_added_token_that_a_decoder_lacks_is_refused(tmp_path):
    write(tmp_path, "gpt_neox", with_token(**PLAIN), KINDS["gpt_neox"] | {"added_tokens_decoder": {0: FIRST}})
    with pytest.raises(ValueError, match=r"lacks '<\|im_end\|>' in added_tokens_decoder"):
        TokenizerFile.read(tmp_path)


def test_the_class_of_a_model_alone_gives_no_token_an_id_beyond_the_vocabulary(tmp_path):
    write(tmp_path, "gpt_neox", BASE, None)
    assert len(TokenizerFile.read(tmp_path)) == len(BASE["model"]["vocab"])
    (tmp_path / "config.json").write_text(json.dumps({"model": "NeoX"}))
    assert TokenizerFile.read(tmp_path).content == (tmp_path / "tokenizer.json").read_text()


def test_settings_add_no_number_of_tokens_that_takes_minutes(tmp_path):
    extra = [f"<{i}>" for i in range(100_000)]
    write(tmp_path, "gpt_neox", BASE, KINDS["llama"] | {"extra_special_tokens": extra})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json .* name 100,000 added tokens; at most 20,000"):
        TokenizerFile.read(tmp_path)
    extra = [f"<{i:040000}>" for i in range(51)]
    write(tmp_path, "gpt_neox", BASE, KINDS["llama"] | {"extra_special_tokens": extra})
    with pytest.raises(ValueError, match="added tokens may have 2,040,102 bytes; at most 2,000,000"):
        TokenizerFile.read(tmp_path)


def test_a_tokenizer_is_loaded_once(tmp_path, monkeypatch):
    calls = []

    def counted(content: str) -> Tokenizer:
        calls.append(content)
        return loaded(content)

    loaded = operations.loaded
    monkeypatch.setattr(operations, "loaded", counted)
    write(tmp_path, "gpt_neox", BASE, KINDS["llama"])
    vocabulary = TokenizerFile.read(tmp_path)
    assert vocabulary.decode(vocabulary.encode("the")) == "the"
    assert vocabulary.eos == (0,)
    assert len(calls) == 1
