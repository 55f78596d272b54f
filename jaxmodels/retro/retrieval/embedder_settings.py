"""Settings in a folder of sentence-transformers, of which those are allowed that embed a text as it is.

The package follows its own files further than models of text need: it renders texts by a template, reads images from
addresses that are texts, builds other models than the one of the weights, and puts any prompt before each text.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxmodels.io.bounded import read_json
from jaxmodels.process.texts import quoted

LONGEST = 2**20  # tokens of a text
MOST_PROMPTS, PROMPT = 100, 2_000  # prompts, and characters of one; published ones have up to 500
MODEL = "config_sentence_transformers.json"
# Files of what reads images, sounds and videos.
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
TEXT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
# What a setting may be, besides nothing; others must be nothing.
OF_TRANSFORMER: Mapping[str, Callable[[Any], bool]] = {
    "max_seq_length": lambda value: type(value) is int and 0 < value <= LONGEST,
    "do_lower_case": lambda value: type(value) is bool,
    "unpad_inputs": lambda value: type(value) is bool,
    "transformer_task": lambda value: value == "feature-extraction",
    "modality_config": lambda value: value == TEXT,
    "module_output_name": lambda value: value == "token_embeddings",
}
OF_MODEL: Mapping[str, Callable[[Any], bool]] = {
    "__version__": lambda value: isinstance(value, dict),
    "model_type": lambda value: value == "SentenceTransformer",
    "similarity_fn_name": lambda value: value in ("cosine", "dot", "euclidean", "manhattan"),
    "prompts": lambda value: (
        isinstance(value, dict) and all(isinstance(prompt, str | None) for prompt in value.values())
    ),
    "default_prompt_name": lambda value: isinstance(value, str),
    "truncate_dim": lambda value: type(value) is int and 0 < value <= LONGEST,
}


def check_settings(folder: Path) -> None:
    """Raise ValueError, naming the file, for settings that do more than to embed a text as it is."""
    for file in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        if file.name in PROCESSORS:
            raise ValueError(f"{file} is of a model of more than texts, which is not read")
        if file.name.startswith("sentence_") or file.name == MODEL:
            check_allowed(file, OF_MODEL if file.name == MODEL else OF_TRANSFORMER)
            if file.name == MODEL:
                check_prompts(file)


def check_allowed(file: Path, allowed: Mapping[str, Callable[[Any], bool]]) -> None:
    """Raise ValueError if a file of settings is no object, or has others than those that are allowed."""
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {quoted(content)}, must be an object")
    for key, value in content.items():
        nothing = value is None or value is False or value in ("", [], {})
        if nothing or (key in allowed and allowed[key](value)):
            continue
        raise ValueError(f"{file} has {quoted(key)} of {quoted(value)}, which does more than to embed a text")


def check_prompts(file: Path) -> None:
    """Raise ValueError for prompts that are too many or too long, and for the name of one that is not there."""
    content = read_json(file)
    prompts, name = content.get("prompts") or {}, content.get("default_prompt_name")
    longest = max((len(prompt or "") for prompt in prompts.values()), default=0)
    if len(prompts) > MOST_PROMPTS or longest > PROMPT:
        raise ValueError(
            f"{file} has {len(prompts):,} prompts of up to {longest:,} characters; at most {MOST_PROMPTS} of {PROMPT:,}"
        )
    if name is not None and name not in prompts:
        raise ValueError(f"{file} has 'default_prompt_name' of {quoted(name)}, which is none of its prompts")
