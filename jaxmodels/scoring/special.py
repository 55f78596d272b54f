"""Special tokens and the chat template of a checkpoint, from the files of its tokenizer."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmodels.io.bounded import CONFIG_BYTES, read_object, read_text
from jaxmodels.process.texts import quoted
from jaxmodels.scoring.templates import ChatTemplate
from jaxmodels.text import TokenizerFile, Vocabulary
from jaxmodels.text.tokenizer.errors import refusing
from jaxmodels.text.tokenizer.special import CONFIG, MODEL, Files, special_tokens

TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
DEFAULT = "default"  # name of the template that is used, of several


def special_tokens_of(files: Files) -> dict[str, str]:
    """Text of each special token by its name, of a checkpoint's companions; see `jaxmodels.text.tokenizer.special`.

    The config.json beside them, which is no companion, tells the class of tokenizer if they do not.
    """
    beside = (place.with_name(MODEL) for name, place in files.items() if "/" not in name)
    model = next((place for place in beside if place.is_file()), None)
    return special_tokens(files if model is None else {**files, MODEL: model})


def special_ids(
    files: Files, ids: Mapping[str, int | None], vocabulary: Vocabulary, n_vocab: int | None, where: str
) -> dict[str, int | None]:
    """Ids of the bos and eos tokens: the tokenizer's, as lm-eval has them, or else those of the model's configuration.

    ids: of the configuration, by "bos" and "eos". One that is not below n_vocab, if that is known, is left out, with a
    warning that names `where`. Raises ValueError as `special_tokens`.
    """
    found: dict[str, int | None] = {}
    named = special_tokens_of(files)
    for name, token in ids.items():
        text = named.get(f"{name}_token")
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
    """Chat template of a checkpoint: its files, or that of tokenizer_config.json; of several, the one named "default".

    Raises ValueError, naming `where` or the file, if there is none, or if a file cannot be read or has another form.
    """
    if not isinstance(vocabulary, TokenizerFile):
        raise ValueError(f"{where} has no tokenizer.json; chat templates need one")
    settings: Mapping[str, Any] = read_object(files[CONFIG]) if CONFIG in files else {}
    prefix = f"{TEMPLATES}/"
    named = {name.removeprefix(prefix): file for name, file in files.items() if name.startswith(prefix)}
    file = named.get(f"{DEFAULT}.jinja", files.get(TEMPLATE))
    if file is None and named:
        raise ValueError(f"{where} has chat templates in {TEMPLATES}, of which none is {DEFAULT}.jinja")
    inside = template_in(settings.get("chat_template"), files.get(CONFIG)) if file is None else None
    text = inside if file is None else read_text(file, CONFIG_BYTES)
    if text is None:
        raise ValueError(f"{where} has no chat template ({TEMPLATE}, or in {CONFIG})")
    return ChatTemplate(text, special_tokens_of(files), f"the chat template of {where}")


def template_in(value: Any, file: Path | None) -> str | None:
    """Template of the entry of a tokenizer_config.json: a text, or the default of several; None if there is none.

    Several are a list of objects with "name" and "template", or an object of templates by name. Raises ValueError,
    naming the file, for a value of another form, and for several without a default.
    """
    if isinstance(value, list) and all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in value):
        value = {each["name"]: each.get("template") for each in value}
    if isinstance(value, dict):
        if DEFAULT not in value:
            raise ValueError(f"{file} has a chat_template without {quoted(DEFAULT)}, but {quoted(sorted(value))}")
        value = value[DEFAULT]
    if not isinstance(value, str | None):
        raise ValueError(f"{file} has chat_template={quoted(value)}; expected a string, or several by name")
    return value
