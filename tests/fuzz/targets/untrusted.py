"""Tokenizers and chat templates that are used, not only read."""

import json
from pathlib import Path
from typing import Any

from tests.fuzz.targets.kind import Target
from tests.fuzz.targets.texts import make_rich_tokenizer, make_tokenizer

SECONDS = 1.0  # of processor time in a confined process: less than usual, so that a busy machine makes no finding
TEXTS = ("abc ab", "a" * 3_000, "-" * 3_000, "aé ß中\ufdfa\n\t0" * 300, " \n" * 1_000, "ab-" * 1_000 + "~")
MESSAGES = [{"role": "user", "content": "Why?\né"}, {"role": "assistant", "content": "a" * 100}]


def use_tokenizer(folder: Path) -> Any:
    from jaxmodels.text import TokenizerFile
    from jaxmodels.text.encoding import Unknown
    from jaxmodels.text.pieces import cut
    from jaxmodels.text.tokenizer import files

    files.SECONDS = SECONDS
    vocabulary = TokenizerFile.read(folder)
    found = [vocabulary.ids_of(ids) for ids in vocabulary.encode_batch(TEXTS)]
    prompts = [vocabulary.encode_prompt(text) for text in TEXTS[:2]]
    pieces = [list(cut([text], vocabulary.cuts, 50, "text")) for text in TEXTS]
    unknown = Unknown()
    for text, ids in zip(TEXTS, found, strict=True):
        unknown.add(vocabulary, text, ids)
    return [vocabulary.decode(ids) for ids in found], prompts, pieces, vocabulary.special, unknown


def make_template(folder: Path) -> None:
    text = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content|trim }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(text + "{% if add_generation_prompt %}[assistant] {% endif %}")


def use_template(folder: Path) -> Any:
    from jaxmodels.io.bounded import CONFIG_BYTES, read_text
    from jaxmodels.scoring import templates

    templates.SECONDS = SECONDS
    file = folder / "chat_template.jinja"
    template = templates.ChatTemplate(read_text(file, CONFIG_BYTES), {"bos_token": "<s>"}, str(file))
    return template.render(MESSAGES), template.render(MESSAGES, generation=False)


def make_chat(folder: Path) -> None:
    """A tokenizer with what lm-eval reads beside it."""
    make_tokenizer(folder)
    special = {"bos_token": {"content": "<|endoftext|>", "lstrip": False}, "eos_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = {"eos_token": "s", "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def use_chat(folder: Path) -> Any:
    from jaxmodels.convert.companions import files_in
    from jaxmodels.scoring import templates
    from jaxmodels.scoring.special import chat_template, special_ids
    from jaxmodels.text import TokenizerFile

    templates.SECONDS = SECONDS
    files, vocabulary = files_in(folder), TokenizerFile.read(folder)
    ids = special_ids(files, {"bos": None, "eos": 0}, vocabulary, 21, str(folder))
    return ids, chat_template(files, vocabulary, str(folder)).render(MESSAGES)


TARGETS = (
    Target("tokenizer, used", make_rich_tokenizer, use_tokenizer, "tokenizer.json"),
    Target("chat template", make_template, use_template, "*.jinja"),
    Target("chat, of lm-eval", make_chat, use_chat),
    Target("chat, of lm-eval, settings", make_chat, use_chat, "*[gp].json"),
)
