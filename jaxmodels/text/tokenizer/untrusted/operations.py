"""Work of a tokenizer, from JSON values to JSON values: here, or in a child process of `process.confined`."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Step = dict[str, Any]


def operations(content: str) -> Mapping[str, Callable[..., Any]]:
    """Operations of the tokenizer of a tokenizer.json; raises what the tokenizers package raises."""
    return operations_of(loaded(content))


def operations_of(tokenizer: Any) -> Mapping[str, Callable[..., Any]]:
    """Operations of a tokenizer by name."""
    functions = (encode, encode_batch, encode_prompt, encode_with_offsets, decode)
    found = {function.__name__: functools.partial(function, tokenizer) for function in functions}
    return found | {"normalize": Normalizers(tokenizer).normalize}


def loaded(content: str) -> Any:
    """`tokenizers.Tokenizer` of a tokenizer.json, without truncation, padding and dropout of merges."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(content)
    tokenizer.no_truncation()  # published files store settings of somebody's last call
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer


def encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Ids of a text, with or without the special tokens that some tokenizers add around it."""
    return list(tokenizer.encode(text, add_special_tokens=special).ids)


def encode_batch(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts, on all cores."""
    return [found.ids for found in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def encode_with_offsets(tokenizer: Any, text: str) -> list[tuple[int, tuple[int, int]]]:
    """Ids of a text, each with the place of the characters that it stands for."""
    found = tokenizer.encode(text, add_special_tokens=False)
    return list(zip(found.ids, found.offsets, strict=True))


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text after the special tokens that the tokenizer puts before texts, without those after them."""
    ids = encode(tokenizer, text, False)
    whole = tokenizer.encode(text)
    first = next((i for i, added in enumerate(whole.special_tokens_mask) if not added), 0)
    same = whole.ids[first : first + len(ids)] == ids  # not if the mask has its own meaning
    return [*whole.ids[:first], *ids] if same else ids


def decode(tokenizer: Any, ids: Sequence[int], skip_special: bool) -> str:
    """Text of ids, with or without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special))


class Normalizers:
    """Normalizers of a tokenizer, those of sequences one after the other."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    @functools.cached_property
    def steps(self) -> list[Any]:
        """`tokenizers.normalizers.Normalizer` of each."""
        from tokenizers import Tokenizer

        def made(step: Step) -> Any:
            model = {"type": "BPE", "vocab": {}, "merges": []}
            return Tokenizer.from_str(json.dumps({"version": "1.0", "normalizer": step, "model": model})).normalizer

        return [made(step) for step in normalizers(self.tokenizer)]

    def normalize(self, first: int, last: int, texts: Sequence[str]) -> list[str]:
        """Texts as the normalizers from `first` to `last` - 1 make them."""
        for step in self.steps[first:last]:
            texts = [str(step.normalize_str(text)) for text in texts]
        return list(texts)


def normalizers(tokenizer: Any) -> list[Step]:
    """Objects of a tokenizer.json of the normalizers of a tokenizer, in the order in which they work."""
    whole = tokenizer.normalizer
    return [] if whole is None else flat(json.loads(whole.__getstate__()), "normalizers")


def flat(step: Step | None, name: str) -> list[Step]:
    """Steps of a normalizer, pre-tokenizer or decoder, those of sequences one after the other."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [each for one in step[name] for each in flat(one, name)]
    return [step]
