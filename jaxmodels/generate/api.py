"""`generate` and `stream`: continuations of ids and of texts.

Axes: S prompt tokens, n new tokens, B prompts, V vocabulary. Ids are [S, B] or [B, S], by the model's `sequence_axis`.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmodels.generate.loop import Decoding, vocabulary_size
from jaxmodels.generate.many import Continuous, check_continuous
from jaxmodels.generate.sampling import Sampling, integer
from jaxmodels.generate.text import TextStream, check_stops, pieces
from jaxmodels.protocols import LanguageModel, check_decoding
from jaxmodels.text import Vocabulary, as_vocabulary
from jaxmodels.weights.precision import for_inference

ROWS = 16  # of a batch of texts
CHUNK = 16  # tokens between two searches for stop texts


def generate(
    model: LanguageModel,
    ids: Any,
    max_new_tokens: int,
    *,
    tokenizer: Any = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    logit_bias: Mapping[int, float] | None = None,
    num_return_sequences: int = 1,
    stop_tokens: Sequence[int] | None = None,
    stop: str | Sequence[str] = (),
    n_tokens: int | None = None,
    start: Any = None,
    window: int | None = None,
    batch_size: int = ROWS,
    dtype: Any = None,
    rng: jax.Array | None = None,
) -> Any:
    """Continue prompts: ids int [S, B] -> new tokens int32 [n, B] (batch-first models: [B, S] -> [B, n]), or texts.

    ids: prompts as ids; or one text, or a list of texts of any lengths, if a tokenizer is given. A text is continued to
        a str, without the prompt and without special tokens; a list of texts to a list of str, in the same order.
    max_new_tokens: n.
    tokenizer: vocabulary of texts: one of `jaxmodels.text`, of tokenizers or of transformers, or the path of a
        tokenizer.json or of its folder.
    temperature: 0 is greedy; above 0, tokens are drawn.
    top_k: draw from the k most likely tokens. top_p: draw from the fewest tokens whose probabilities reach p.
        min_p: draw from the tokens with at least min_p times the probability of the most likely one.
    repetition_penalty: divides positive logits, and multiplies negative ones, of tokens in the text so far. 1 is off.
    logit_bias: token id -> number added to its logit; -inf excludes it.
    num_return_sequences: continuations of each prompt, next to each other in the result (B · num_return_sequences
        rows); of one text, a list.
    stop_tokens: a row that has drawn one of them repeats it to the end; the text ends before it. Default: none for ids;
        for texts those of the tokenizer (`Vocabulary.eos`). () for none.
    stop: texts, before which a text ends; also special tokens, or a text that contains them.
    n_tokens: size of the vocabulary without padding rows, which are never drawn; default all, or the tokenizer's.
    start: int [B], number of left-padding ids in each row.
    window: number of tokens that the model attends to: a longer text is continued from its last window // 2 tokens.
    batch_size: texts are continued in batches of so many rows, sorted by length.
    dtype: floating dtype of the weights in this call; default their own, but float32 for 16-bit weights on CPUs, which
        is exact and faster (logged once); the weights of a NeoX then stay in 16 bits if its kernel can be compiled.
    rng: key of the draws; default `jax.random.key(0)`. Each row draws by a key of its own.

    Settings are applied in the order of transformers: bias, penalty, temperature, top-k, top-p, min-p. The prompt takes
    one pass; the new tokens take one compiled loop per size of the cache, which grows in powers of two, so that a
    token's cost depends on its position and not on n.

    Raises ValueError if the model lacks a member of `LanguageModel`, if a setting is out of range, if prompt and new
    tokens exceed the model's tables, or if the model's logits are NaN or infinite.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, logit_bias)
    copies = integer("num_return_sequences", num_return_sequences)
    shared = Shared(model, max_new_tokens, sampling, copies, n_tokens, window, rng, dtype)
    if not is_text(ids):
        check_ids_arguments(tokenizer, stop)
        decoding = shared.decoding(ids, stop_tokens or (), start=start)
        decoding.advance()
        tokens = decoding.tokens()
        return tokens if decoding.axis == 0 else tokens.T
    prompts = Prompts.of(ids, tokenizer, stop, stop_tokens, start)
    texts = continue_texts(shared, prompts, integer("batch_size", batch_size))
    return texts[0] if isinstance(ids, str) and copies == 1 else texts


def stream(
    model: LanguageModel,
    ids: Any,
    max_new_tokens: int,
    *,
    tokenizer: Any = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    logit_bias: Mapping[int, float] | None = None,
    stop_tokens: Sequence[int] | None = None,
    stop: str | Sequence[str] = (),
    n_tokens: int | None = None,
    start: Any = None,
    window: int | None = None,
    dtype: Any = None,
    rng: jax.Array | None = None,
) -> Iterator[Any]:
    """Iterate over the tokens int32 [B], or the pieces of text, of which `generate` returns the whole.

    The arguments and errors are those of `generate`, with one text instead of a list. Tokens end when every row has
    drawn a stop token, which is the last one. Text comes in whole characters, and is held back while it may be the
    beginning of a stop text. Arguments are checked by the call, before the first item.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, logit_bias)
    shared = Shared(model, max_new_tokens, sampling, 1, n_tokens, window, rng, dtype)
    if not is_text(ids):
        check_ids_arguments(tokenizer, stop)
        return shared.decoding(ids, stop_tokens or (), start=start).each()
    if not isinstance(ids, str):
        raise ValueError(f"ids has {len(ids)} texts; a stream continues one: use generate for several")
    prompts = Prompts.of(ids, tokenizer, stop, stop_tokens, start)
    prompt = prompts.ids[0]
    decoding = shared.of_prompts(prompts, [0])
    return pieces(prompts.stream(prompt), (token[0] for token in decoding.each()))


def generate_many(
    model: LanguageModel,
    prompts: Sequence[Any],
    max_new_tokens: int | Sequence[int],
    *,
    tokenizer: Any = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    logit_bias: Mapping[int, float] | None = None,
    stop_tokens: Sequence[int] | None = None,
    stop: str | Sequence[str] = (),
    n_tokens: int | None = None,
    rows: int = ROWS,
    dtype: Any = None,
    rng: jax.Array | None = None,
) -> list[Any]:
    """Continue many prompts of different lengths and ends: a row whose text ends makes room for the next prompt.

    prompts: texts, continued to str; or sequences of ids int [S], continued to arrays int32 [at most max_new_tokens],
        of which a stop token is the last. Results are in the order of the prompts.
    max_new_tokens: for all prompts, or a number for each.
    rows: number of prompts that are decoded together.
    rng: prompt k draws as row k of `generate` does, by `fold_in(rng, k)`, whatever is decoded beside it.

    Other arguments are those of `generate`. Tokens are those of each prompt alone, up to rounding. Raises ValueError as
    `generate`, and if the model has no `cache_by_position`: see `jaxmodels.protocols.LanguageModel`.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, logit_bias)
    if isinstance(prompts, str) or not hasattr(prompts, "__len__") or not len(prompts):
        raise ValueError("prompts must be a list of texts or of sequences of ids, at least one")
    prompts = list(prompts)
    each: Any = [max_new_tokens] * len(prompts) if np.ndim(max_new_tokens) == 0 else max_new_tokens
    given: list[int] = list(each)
    if len(given) != len(prompts):
        raise ValueError(f"max_new_tokens has {len(given)} numbers for {len(prompts)} prompts")
    check_continuous(model)
    shared = Shared(model, max(integer("max_new_tokens", n) for n in given), sampling, 1, n_tokens, None, rng, dtype)
    if is_text(prompts):
        return list(continue_many(shared, Prompts.of(prompts, tokenizer, stop, stop_tokens, None), rows, given))
    check_ids_arguments(tokenizer, stop)
    ids = [sequence(k, one) for k, one in enumerate(prompts)]
    found: list[list[np.ndarray]] = [[] for _ in ids]
    continuous = shared.continuous(ids, given, rows, stop_tokens or (), n_tokens)
    for result in continuous.results():
        found[result.prompt].append(result.tokens)
    return [np.concatenate(parts) for parts in found]


def sequence(number: int, ids: Any) -> np.ndarray:
    """Prompt int32 [S]; raises ValueError, with its number, if it is not a non-empty sequence of integers."""
    found = np.asarray(ids)
    if found.ndim != 1 or not found.size or not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"prompts[{number}] must be a non-empty sequence of ids, got {found.dtype}{list(found.shape)}")
    if max(found.max(), -found.min()) > np.iinfo(np.int32).max:
        raise ValueError(f"prompts[{number}] has ids from {found.min()} to {found.max()}, beyond the vocabulary")
    return found.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Shared:
    """Arguments that `generate` and `stream` have in common."""

    model: LanguageModel
    n: int
    sampling: Sampling
    copies: int
    n_tokens: int | None
    window: int | None
    key: jax.Array | None
    dtype: Any = None

    def __post_init__(self) -> None:
        check_decoding(self.model)
        integer("max_new_tokens", self.n)
        if self.window is not None:
            integer("window", self.window, 2)
        object.__setattr__(self, "model", for_inference(self.model, self.dtype))

    def decoding(self, ids: Any, stop_tokens: Sequence[int], **others: Any) -> Decoding:
        """Decoding of a matrix of ids."""
        settings = {"n_tokens": self.n_tokens, "window": self.window, "key": self.key, "copies": self.copies}
        return Decoding(self.model, ids, self.n, self.sampling, stop_tokens=stop_tokens, **settings | others)

    def of_prompts(self, prompts: "Prompts", chosen: Sequence[int], length: int | None = None) -> Decoding:
        """Decoding of the prompts of the given numbers, padded on the left to the same length."""
        ids = [prompts.ids[i] for i in chosen]
        longest = max(length or 0, *map(len, ids))
        padded = np.stack([np.pad(one, (longest - len(one), 0)) for one in ids])  # [B, S]
        start = None if len({longest, *map(len, ids)}) == 1 else longest - np.asarray([len(one) for one in ids])
        numbers = [i * self.copies + copy for i in chosen for copy in range(self.copies)]
        n_tokens, stop_tokens = self.ends(prompts)
        ids_of = padded if self.model.sequence_axis == 1 else padded.T
        return self.decoding(ids_of, stop_tokens, start=start, rows=numbers, n_tokens=n_tokens)

    def ends(self, prompts: "Prompts") -> tuple[int, tuple[int, ...]]:
        """Size of the vocabulary that is drawn from, and the stop tokens of texts."""
        n_tokens = self.n_tokens
        if n_tokens is None:
            n_tokens = min(len(prompts.vocabulary), vocabulary_size(self.model))
        return n_tokens, (*prompts.stop_tokens, *(token for token in prompts.ends if token < n_tokens))

    def continuous(
        self, ids: Sequence[np.ndarray], n: Sequence[int], rows: int, stops: Sequence[int], n_tokens: int | None
    ) -> Continuous:
        """Continuous decoding of prompts, each with its copies next to each other."""
        return Continuous(
            self.model,
            [one for one in ids for _ in range(self.copies)],
            [one for one in n for _ in range(self.copies)],
            self.sampling,
            rows=rows,
            stop_tokens=stops,
            n_tokens=n_tokens,
            key=self.key,
        )


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Texts to continue, and where their continuations end."""

    ids: list[np.ndarray]
    vocabulary: Vocabulary
    stops: tuple[str, ...]  # without those that are one special token
    stop_tokens: tuple[int, ...]  # as given
    ends: tuple[int, ...]  # those of the vocabulary, and of the stop texts that are one special token

    @classmethod
    def of(cls, texts: Any, tokenizer: Any, stop: Any, stop_tokens: Sequence[int] | None, start: Any) -> "Prompts":
        """Encode texts; raises ValueError if one has no tokens, or if the tokenizer is missing."""
        if tokenizer is None:
            raise ValueError("tokenizer=None, but ids is a text; pass the model's tokenizer")
        if start is not None:
            raise ValueError("start must be None for texts; they are padded as needed")
        vocabulary, stops = as_vocabulary(tokenizer), check_stops(stop)
        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = [vocabulary.encode_prompt(text) for text in texts]
        for text, one in zip(texts, ids, strict=True):
            if not len(one):
                raise ValueError(f"prompt={text!r} must have at least one token")
        single = {content: token for token, content in vocabulary.special.items()}
        ends = tuple(single[text] for text in stops if text in single)
        if stop_tokens is None:
            ends += tuple(vocabulary.eos)
        others = tuple(text for text in stops if text not in single)
        return cls(ids, vocabulary, others, tuple(stop_tokens or ()), ends)

    def stream(self, prompt: Any) -> TextStream:
        return TextStream(self.vocabulary, prompt, self.stops, (*self.stop_tokens, *self.ends))


def continue_texts(shared: Shared, prompts: Prompts, batch_size: int) -> list[str]:
    """Continue texts in batches of similar lengths; the results are in the order of the prompts."""
    lengths = [len(one) for one in prompts.ids]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found: dict[int, list[str]] = {}
    for chosen in batches(order, lengths, max(1, batch_size // shared.copies), shared.window is not None):
        decoding = shared.of_prompts(prompts, chosen)
        texts = written(decoding, [prompts.stream(prompts.ids[i]) for i in chosen for _ in range(shared.copies)])
        for number, i in enumerate(chosen):
            found[i] = texts[number * shared.copies : (number + 1) * shared.copies]
    return [text for i in range(len(lengths)) for text in found[i]]


def continue_many(shared: Shared, prompts: Prompts, rows: int, n: Sequence[int]) -> Iterator[str]:
    """Iterate over the continuations in the order of the prompts, each as soon as it and those before it are written.

    n: new tokens of each prompt.
    """
    n_tokens, stop_tokens = shared.ends(prompts)
    continuous = shared.continuous(prompts.ids, n, rows, stop_tokens, n_tokens)
    streams: dict[int, TextStream] = {}
    texts: dict[int, str] = {}
    ready: dict[int, str] = {}
    following = 0
    for k, tokens, ended in continuous.results(CHUNK if prompts.stops else None):
        if k not in streams:
            streams[k], texts[k] = prompts.stream(prompts.ids[k // shared.copies]), ""
        stream = streams[k]
        for token in tokens:
            if not stream.ended:
                texts[k] += stream.add(token)
        if stream.ended and not ended:
            continuous.stop(k)
        if stream.ended or ended:
            ready[k] = texts.pop(k) + streams.pop(k).rest()
        while following in ready:
            yield ready.pop(following)
            following += 1


def batches(order: Sequence[int], lengths: Sequence[int], size: int, equal: bool) -> Iterator[list[int]]:
    """Divide prompts, sorted by length, into batches; `equal`: of prompts of one length only."""
    batch: list[int] = []
    for i in order:
        if len(batch) == size or (batch and equal and lengths[batch[0]] != lengths[i]):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def written(decoding: Decoding, streams: Sequence[TextStream]) -> list[str]:
    """Texts of all rows; they are searched for stop texts every CHUNK tokens."""
    texts = [""] * len(streams)
    step = CHUNK if any(stream.stops for stream in streams) else decoding.n
    begin = 0
    while begin < decoding.n and not all(stream.ended for stream in streams):
        decoding.advance(begin + step)
        tokens = np.asarray(decoding.tokens())[begin:]  # [step, B]
        for row, stream in enumerate(streams):
            for token in tokens[:, row]:
                if not stream.ended:
                    texts[row] += stream.add(token)
        decoding.stop(np.asarray([stream.ended for stream in streams]))
        begin += step
    return [text + stream.rest() for text, stream in zip(texts, streams, strict=True)]


def is_text(ids: Any) -> bool:
    """True for a text and for a list of texts; raises ValueError for an empty list, or one of texts and others."""
    if isinstance(ids, str):
        return True
    if not isinstance(ids, list | tuple):
        return False
    if not ids:
        raise ValueError("ids is empty; it must have at least one prompt")
    texts = [isinstance(one, str) for one in ids]
    if any(texts) and not all(texts):
        raise ValueError("ids must be texts or token ids, not both")
    return all(texts)


def check_ids_arguments(tokenizer: Any, stop: Any) -> None:
    """Raises ValueError if an argument for texts is given with ids."""
    for name, value in (("tokenizer", tokenizer), ("stop", stop or None)):
        if value is not None:
            raise ValueError(f"{name} is for prompts that are texts; ids are token ids")
