"""Settings beside a tokenizer.json, applied as transformers 5 applies them.

transformers adds the tokens that the settings name to the tokenizer. One of the classes GPT2Tokenizer and
GPTNeoXTokenizer it builds again from the vocabulary and the merges: the other rules of the file do not count.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmodels.process.texts import quoted
from jaxmodels.text.tokenizer import limits
from jaxmodels.text.tokenizer.special import (
    ADDED,
    CLASSES,
    CONFIG,
    DEFAULTS,
    MODEL,
    NEOX,
    Files,
    content_of_file,
    files_beside,
    flag,
    listed_tokens,
    named_tokens,
    settings_of,
    special_tokens,
    tokenizer_class,
    unnamed_tokens,
)
from jaxmodels.text.tokenizer.untrusted import operations
from jaxmodels.text.tokenizer.untrusted.operations import flat

MOST_TOKENS = 20_000  # that settings add to a tokenizer; published ones have up to 6,500, in tokenizer.json too
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}  # all of one effect
# What transformers' clean_up_tokenization replaces in a decoded text, in this order, by the text without its spaces.
SPACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
CLEAN, CLEAN_BPE = (
    "clean_up_tokenization_spaces",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
)
AS_IT_IS = 'to read the file as it is, here and in transformers, set "tokenizer_class": "PreTrainedTokenizerFast"'


def with_settings(file: Path, content: str, tokenizer: Any) -> str:
    """Text of a tokenizer.json with the rules and added tokens that transformers gives it.

    tokenizer: `tokenizers.Tokenizer` of the text. Raises ValueError, naming the file, for settings that contradict it.
    """
    files = files_beside(file)
    where = files.get(CONFIG, file.with_name(CONFIG))
    refuse_split(files, where)
    rules = rules_of_class(files, where, tokenizer)
    rules |= cleaning(files, tokenizer, rules)
    missing = list(missing_tokens(file, files, tokenizer))
    if rules or missing:
        tokenizer = operations.loaded(json.dumps({**json.loads(content), **rules}))
        add(tokenizer, missing, where)
        content = tokenizer.to_str()
    refuse_contradictions(file, files, where, tokenizer)
    return content


def refuse_split(files: Files, where: Path) -> None:
    """Raise ValueError for a tokenizer that encodes special tokens in a text as other text."""
    if flag(files, "split_special_tokens"):
        raise ValueError(f"{where} has split_special_tokens=True, which is not supported")


def rebuilt_class(files: Files) -> str | None:
    """Class of which transformers builds a tokenizer.json again; None if it reads the file as it is.

    It does so for a class of a model that has no class of its own, such as GPT2Tokenizer of a gpt_bigcode.
    """
    model, settings = content_of_file(files, MODEL), content_of_file(files, CONFIG)
    kind, found = model.get("model_type"), tokenizer_class(files)
    named = settings.get("tokenizer_class") or model.get("tokenizer_class")
    if found not in DEFAULTS or not (kind in CLASSES if isinstance(kind, str) and kind else named):
        return None
    return found


def rules_of_class(files: Files, where: Path, tokenizer: Any) -> dict[str, Any]:
    """Parts of a tokenizer.json that its class replaces; raises ValueError if they make other ids of most texts."""
    kind = rebuilt_class(files)
    if kind is None:
        return {}
    parts = json.loads(tokenizer.to_str())
    normalizers, words = flat(parts["normalizer"], "normalizers"), flat(parts["pre_tokenizer"], "pretokenizers")
    prefix, model = flag(files, "add_prefix_space"), parts["model"]
    differing = [] if [step["type"] for step in normalizers] in ([], ["NFC"]) else ["normalizer"]
    if [step["type"] for step in words] != ["ByteLevel"] or not words[0]["use_regex"]:
        differing.append("pre_tokenizer")
    elif words[0]["add_prefix_space"] != prefix:
        raise ValueError(f"{where} has add_prefix_space={prefix}; tokenizer.json has {words[0]['add_prefix_space']}")
    if not is_byte_level(model):
        differing.append("model")
    if differing:
        raise ValueError(
            f"tokenizer.json has another {' and '.join(differing)} than {kind}, by whose rules transformers reads it; "
            f"{AS_IT_IS} in {where}"
        )
    rules: dict[str, Any] = {}
    wanted = ["NFC"] if kind == NEOX else []
    if [step["type"] for step in normalizers] != wanted:
        rules["normalizer"] = {"type": "NFC"} if wanted else None
    if [step["type"] for step in flat(parts["decoder"], "decoders")] != ["ByteLevel"]:
        rules["decoder"] = BYTES
    after = parts["post_processor"]
    if kind == NEOX and after is not None and after["type"] != "ByteLevel":
        rules["post_processor"] = None  # transformers 5 gives a GPTNeoXTokenizer one that adds no tokens
    return rules


def cleaning(files: Files, tokenizer: Any, rules: Mapping[str, Any]) -> dict[str, Any]:
    """Decoder that also removes the spaces that transformers removes from a decoded text; {} if it removes none.

    rules: parts that take the place of the tokenizer's own.
    """
    if not flag(files, CLEAN) or (type(tokenizer.model).__name__ == "BPE" and not flag(files, CLEAN_BPE)):
        return {}
    parts = {**json.loads(tokenizer.to_str()), **rules}
    # Without a decoder, tokens are joined by spaces: so does this one, whose prefix no token has.
    decoders = flat(parts.get("decoder"), "decoders") or [{"type": "WordPiece", "prefix": "\uffff", "cleanup": False}]
    replaced = [{"type": "Replace", "pattern": {"String": text}, "content": text.replace(" ", "")} for text in SPACED]
    return {"decoder": {"type": "Sequence", "decoders": [*decoders, {"type": "Fuse"}, *replaced]}}


def is_byte_level(model: Mapping[str, Any]) -> bool:
    """True for a BPE of bytes without the settings that the classes of byte-level tokenizers do not have."""
    from tokenizers import pre_tokenizers

    if model["type"] != "BPE" or model.get("ignore_merges"):
        return False
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    whole = model["vocab"].keys() >= set(pre_tokenizers.ByteLevel.alphabet())  # nothing is unknown
    return whole or not (model.get("unk_token") or model.get("byte_fallback"))


def missing_tokens(file: Path, files: Files, tokenizer: Any, *, every: bool = False) -> Iterator[Any]:
    """Added tokens that the settings name and a tokenizer lacks, or has with other flags, in transformers' order.

    every: also default tokens of a class that tokenizer_config.json does not name.
    """
    there = tokenizer.get_added_tokens_decoder().values()
    named = set(special_tokens(files).values())
    known, contents = {repr(token) for token in there}, {token.content for token in there}
    for _, about in sorted(listed_tokens(file).items()):
        token = token_of(about)
        contents.add(token.content)
        if repr(token) not in known:
            token.special = token.special or token.content in named
            yield token
    defaults, *own = settings_of(files)
    # The class of a model alone gives no token an id beyond the vocabulary, and of this project's model none at all:
    # a model that was trained here has the tokenizer's own ids.
    made = CONFIG not in files and content_of_file(files, MODEL).get("model") is not None
    for name, value in [*named_tokens(files).items(), *(("", token) for token in unnamed_tokens(files))]:
        token = token_of(value, special=True)
        if not token.content or token.content in contents:
            continue
        default = name in defaults and not any(name in each for each in own)
        if default and not every and (made or (CONFIG not in files and tokenizer.token_to_id(token.content) is None)):
            continue
        contents.add(token.content)
        yield token


def add(tokenizer: Any, tokens: Sequence[Any], where: Path) -> None:
    """Add tokens to a `tokenizers.Tokenizer`; raises ValueError, naming the settings, if they are too many or long."""
    if len(tokens) > MOST_TOKENS:
        raise ValueError(f"{where} and the files beside it name {len(tokens):,} added tokens; at most {MOST_TOKENS:,}")
    contents = [{"content": token.content, "normalized": token.normalized} for token in tokens]
    limits.check_added(contents, operations.normalizers(tokenizer))
    tokenizer.add_tokens(tokens)


def token_of(about: Any, special: bool = False) -> Any:
    """`tokenizers.AddedToken` of a text, or of an object with "content" and flags."""
    from tokenizers import AddedToken

    if isinstance(about, str):
        return AddedToken(about, special=special, normalized=not special)
    is_special = special or bool(about.get("special"))
    flags = {name: bool(about.get(name)) for name in ("single_word", "lstrip", "rstrip")}
    normalized = bool(about.get("normalized", not is_special))
    return AddedToken(about["content"], special=is_special, normalized=normalized, **flags)


def refuse_contradictions(file: Path, files: Files, where: Path, tokenizer: Any) -> None:
    """Raise ValueError if added tokens of the settings have other ids, or are not all of those of the class."""
    settings, listed = content_of_file(files, CONFIG), listed_tokens(file)
    added = {about.content: i for i, about in tokenizer.get_added_tokens_decoder().items()}
    for i, about in listed.items():
        if added.get(about["content"]) != i:
            place = where if "added_tokens_decoder" in settings else file.with_name(ADDED)
            there = added.get(about["content"], "no such added token")
            raise ValueError(f"{place} has {quoted(about['content'])} with the id {i}; the tokenizer has {there}")
    if "added_tokens_decoder" in settings and rebuilt_class(files) is not None:
        named = {token_of(value).content for value in (*named_tokens(files).values(), *unnamed_tokens(files))}
        lacking = added.keys() - named - {about["content"] for about in listed.values()}
        if lacking:
            raise ValueError(
                f"{where} lacks {quoted(min(lacking))} in added_tokens_decoder, an added token of tokenizer.json"
            )
