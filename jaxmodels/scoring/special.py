"""Special tokens and the chat template of a checkpoint, from the files of its tokenizer."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmodels.io.bounded import CONFIG_BYTES, read_object, read_text
from jaxmodels.process.texts import quoted
from jaxmodels.scoring.templates import ChatTemplate
from jaxmodels.text import TokenizerFile, Vocabulary
from jaxmodels.text.errors import refusing
from jaxmodels.text.tokenizer import CONFIG, SPECIAL, content_of

TEMPLATE = "chat_template.jinja"
Files = Mapping[str, Path]  # by published name


def special_token(files: Files, name: str) -> str | None:
    """Text of a special token such as bos_token; None if no file names it.

    That of tokenizer_config.json, also if it is null there, else of special_tokens_map.json. Raises ValueError, naming
    the file, if one cannot be read or its value is no text.
    """
    found = None
    for file in (SPECIAL, CONFIG):
        settings = read_object(files[file]) if file in files else {}
        if name in settings:
            found = content_of(files[file], settings, name)
    return found


def special_ids(
    files: Files, ids: Mapping[str, int | None], vocabulary: Vocabulary, n_vocab: int | None, where: str
) -> dict[str, int | None]:
    """Ids of the bos and eos tokens: the tokenizer's, as lm-eval has them, or else those of the model's configuration.

    ids: of the configuration, by "bos" and "eos". One that is not below n_vocab, if that is known, is left out, with a
    warning that names `where`. Raises ValueError as `special_token`.
    """
    found: dict[str, int | None] = {}
    for name, token in ids.items():
        text = special_token(files, f"{name}_token")
        if text is not None and isinstance(vocabulary, TokenizerFile):
            with refusing(f"{where} has a {name}_token that the tokenizer cannot look up"):
                known = vocabulary.tokenizer.token_to_id(text)
            token = token if known is None else known
        if token is not None and isinstance(n_vocab, int) and token >= n_vocab:
            warnings.warn(f"{where}: the {name} token {token} is ignored: the model has {n_vocab} tokens", stacklevel=2)
            token = None
        found[name] = token
    return found


def chat_template(files: Files, vocabulary: Vocabulary, where: str) -> ChatTemplate:
    """Chat template of a checkpoint: chat_template.jinja, or that of tokenizer_config.json.

    Raises ValueError, naming `where` or the file, if there is none, or if a file cannot be read or has another form.
    """
    if not isinstance(vocabulary, TokenizerFile):
        raise ValueError(f"{where} has no tokenizer.json; chat templates need one")
    settings: Mapping[str, Any] = read_object(files[CONFIG]) if CONFIG in files else {}
    text = read_text(files[TEMPLATE], CONFIG_BYTES) if TEMPLATE in files else settings.get("chat_template")
    if text is None:
        raise ValueError(f"{where} has no chat template ({TEMPLATE}, or in {CONFIG})")
    if not isinstance(text, str):
        raise ValueError(f"{files[CONFIG]} has chat_template={quoted(text)}; expected a string")
    names = {name: special_token(files, name) for name in ("bos_token", "eos_token")}
    return ChatTemplate(text, {name: token for name, token in names.items() if token}, f"the chat template of {where}")
