"""Special tokens that the files of a tokenizer name, resolved once, as transformers 5 resolves them.

Files are given by their published names: tokenizer_config.json, special_tokens_map.json, and the config.json beside
them, which tells the class of tokenizer if the first does not.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxmodels.io.bounded import read_object, refuse_special
from jaxmodels.process.texts import quoted
from jaxmodels.text.tokenizer.ids import token_id

CONFIG, SPECIAL, MODEL = "tokenizer_config.json", "special_tokens_map.json", "config.json"
ADDED = "added_tokens.json"
MODEL_SPECIFIC = "model_specific_special_tokens"  # in tokenizer_config.json; transformers writes it beside each of them
END_OF_TEXT = "<|endoftext|>"  # ends a text if no file says what does
STANDARD = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
FLAGS = ("add_bos_token", "add_eos_token")  # which transformers ignores beside a tokenizer.json
EXTRA = ("extra_special_tokens", "additional_special_tokens")  # the second, of former versions, if the first is empty
GPT2, NEOX = "GPT2Tokenizer", "GPTNeoXTokenizer"
# Special tokens of a class, for those that no file names.
DEFAULTS: Mapping[str | None, Mapping[str, Any]] = {
    GPT2: dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    NEOX: {**dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT), "pad_token": "<|padding|>"},
}
# Class of a type of model in transformers 5.
LIKE_GPT2 = "gpt2 gpt_neo gptj opt blip-2 codegen dbrx emu3 instructblip instructblipvideo jais2 phi starcoder2"
LIKE_NEOX = "gpt_neox falcon_mamba mamba mamba2 mpt olmo olmoe rwkv xlstm"
CLASSES = dict.fromkeys(LIKE_GPT2.split(), GPT2) | dict.fromkeys(LIKE_NEOX.split(), NEOX)
Files = Mapping[str, Path]  # by published name


def files_beside(file: Path) -> dict[str, Path]:
    """Files of special tokens in the folder of a file."""
    places = {name: file.with_name(name) for name in (CONFIG, SPECIAL, MODEL)}
    for place in places.values():
        refuse_special(place)
    return {name: place for name, place in places.items() if place.is_file()}


def tokenizer_class(files: Files) -> str | None:
    """Class of a tokenizer, of those in DEFAULTS without the "Fast" of former versions; None if no file tells it.

    That of tokenizer_config.json, or else of config.json, or else of its type of model. Raises ValueError, naming the
    file, for a name that is no string.
    """
    model = content_of_file(files, MODEL)
    for name, settings in ((CONFIG, content_of_file(files, CONFIG)), (MODEL, model)):
        found = settings.get("tokenizer_class")
        if not isinstance(found, str | None):
            raise ValueError(f"{files[name]} has tokenizer_class={quoted(found)}; expected a string")
        if found:
            return short if (short := found.removesuffix("Fast")) in DEFAULTS else found
    kind = "gpt_neox" if model.get("model") == "NeoX" else model.get("model_type")  # NeoX: a model of this project
    return CLASSES.get(kind) if isinstance(kind, str) else None


def settings_of(files: Files) -> list[dict[str, Any]]:
    """Settings of a tokenizer, those that count last: the defaults of its class, tokenizer_config.json, and the map.

    transformers reads special_tokens_map.json only if tokenizer_config.json has no added_tokens_decoder.
    """
    settings = content_of_file(files, CONFIG)
    mapped = {} if "added_tokens_decoder" in settings else content_of_file(files, SPECIAL)
    return [dict(DEFAULTS.get(tokenizer_class(files), {})), settings, mapped]


def special_tokens(files: Files) -> dict[str, str]:
    """Text of each special token by its name; see `named_tokens`."""
    return {key: value["content"] if isinstance(value, dict) else value for key, value in named_tokens(files).items()}


def named_tokens(files: Files) -> dict[str, Any]:
    """Special tokens by their names, such as bos_token, that a chat template may use: texts, or objects with "content".

    Besides the standard names, those of other entries that end in _token, of which tokenizer_config.json's count, of
    extra_special_tokens, and of MODEL_SPECIFIC. Raises ValueError, naming the file, if one cannot be read or a value is
    no text.
    """
    where, (defaults, settings, mapped) = files.get(CONFIG, Path(CONFIG)), settings_of(files)
    for name, each in ((CONFIG, content_of_file(files, CONFIG)), (SPECIAL, content_of_file(files, SPECIAL))):
        for key in STANDARD:  # errors name the file that has the value
            content_of(files.get(name, where), each, key)
    standard = {**defaults, **settings, **mapped}
    named: dict[str, Any] = {key: standard.get(key) for key in STANDARD}
    for each in (mapped, settings):  # others are flags, such as add_bos_token, or settings of the class
        named |= {key: value for key, value in each.items() if key not in EXTRA and is_model_specific(key, value)}
    for each in (settings, mapped):
        extra = each.get(EXTRA[0]) or each.get(EXTRA[1])
        named |= extra if isinstance(extra, dict) else {}
    if not any(is_model_specific(key, value) for key, value in settings.items()):  # which take its place
        named |= checked_named(where, settings.get(MODEL_SPECIFIC))
    return {key: value for key, value in named.items() if content_of(where, named, key) is not None}


def is_model_specific(key: str, value: Any) -> bool:
    """True for an entry of tokenizer_config.json of one or several tokens with names that are not standard."""
    if key in EXTRA:
        return isinstance(value, dict) and bool(value)
    return key.endswith("_token") and key not in (*STANDARD, *FLAGS) and (isinstance(value, str) or is_token(value))


def checked_named(file: Path, tokens: Any) -> dict[str, Any]:
    """Value of MODEL_SPECIFIC, tokens by name; raises ValueError, naming the file, if it is of another kind."""
    if not isinstance(tokens, dict | None):
        raise ValueError(f"{file} has {MODEL_SPECIFIC}={quoted(tokens)}; expected an object")
    return tokens or {}


def is_token(value: Any) -> bool:
    """True for an object with the text of a token."""
    return isinstance(value, dict) and isinstance(value.get("content"), str)


def unnamed_tokens(files: Files) -> list[str]:
    """Texts of special tokens that are listed without a name; raises ValueError, naming the file, if one is none."""
    where, found = files.get(CONFIG, Path(CONFIG)), dict[str, None]()
    for settings in settings_of(files):
        for key in EXTRA:
            listed = settings.get(key)
            tokens = [content_of(where, {key: token}, key) for token in (listed if isinstance(listed, list) else ())]
            found |= dict.fromkeys(token for token in tokens if token is not None)
    return list(found)


def flag(files: Files, name: str) -> bool:
    """Setting of tokenizer_config.json that is true or false; raises ValueError, naming the file, for another value."""
    value = content_of_file(files, CONFIG).get(name)
    if not isinstance(value, bool | None):
        raise ValueError(f"{files[CONFIG]} has {name}={quoted(value)}; expected true or false")
    return bool(value)


def content_of_file(files: Files, name: str) -> dict[str, Any]:
    """Content of a JSON file; {} if there is none. Raises ValueError if it is no object."""
    return dict(read_object(files[name])) if name in files else {}


def added_tokens(file: Path, entries: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Ids and entries of "added_tokens_decoder"; raises ValueError, naming the file, if one has another form."""
    if not isinstance(entries, dict | None):
        raise ValueError(f"{file} has added_tokens_decoder={quoted(entries)}; expected an object")
    for i, about in (entries or {}).items():
        if not isinstance(about, dict) or not isinstance(about.get("content"), str):
            raise ValueError(f"{file} has {quoted(about)} in added_tokens_decoder; expected an object with content")
        yield checked_id(file, i), about


def listed_tokens(file: Path) -> dict[int, dict[str, Any]]:
    """Entries of added tokens by id, of the added_tokens_decoder beside a file, or else of added_tokens.json.

    Raises ValueError, naming the file, for an entry of another form.
    """
    files, more = files_beside(file), file.with_name(ADDED)
    settings = content_of_file(files, CONFIG)
    entries = dict(added_tokens(file.with_name(CONFIG), settings.get("added_tokens_decoder")))
    refuse_special(more)
    if "added_tokens_decoder" not in settings and more.is_file():
        special = {*special_tokens(files).values(), *unnamed_tokens(files)}
        for name, i in read_object(more).items():
            entries[checked_id(more, i)] = {"content": name, "special": name in special}
    return entries


def checked_id(file: Path, value: Any) -> int:
    """Id of a token, an integer or its digits; raises ValueError, naming the file, for any other value."""
    token = token_id(value)
    if token is None:
        raise ValueError(f"{file} has the id {quoted(value)}; expected an integer from 0 to 2³¹ - 1")
    return token


def content_of(file: Path, settings: Mapping[str, Any], name: str) -> str | None:
    """Text of a special token in a file of transformers: a string, or an object with "content"; None if there is none.

    Raises ValueError, naming the file, for any other value.
    """
    value = settings.get(name)
    token = value.get("content") if isinstance(value, dict) else value
    if not isinstance(token, str) and value is not None:
        raise ValueError(f"{file} has {name}={quoted(value)}; expected a string, or an object with content")
    return token
