"""Embedders: functions of texts to vectors, of which similar texts have near ones.

An embedder has a `width`, a `name` that contains everything its vectors depend on (and is stored with an index), and
`embed(texts) -> float32 [n, width]`, with rows of norm 1 or 0, so that an inner product is the cosine.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxmodels.process.streams import records_escaped
from jaxmodels.process.texts import quoted, shortened
from jaxmodels.retro.retrieval.embedder_files import (
    check_files,
    check_modules,
    confined_tokenizers,
    first_module,
    without_reports,
)
from jaxmodels.text import TokenizerFile
from jaxmodels.text.tokenizer.errors import is_panic
from jaxmodels.weights.names import listed

MOST_WIDTH, MOST_LONG = 16_384, 32
MOST_GRAMS = 2**20  # of a text, which are in memory together; a chunk of 1,024 long words has 30,000
MOST_CALLS = 100_000  # of modules for a batch; BERT-large has 400, and shared layers are called again


class Embedder(Protocol):
    """Protocol of embedders for an index."""

    @property
    def name(self) -> str: ...

    @property
    def width(self) -> int: ...

    def embed(self, texts: Sequence[str]) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class HashedNGrams:
    """Counts of character n-grams, hashed with signs to `width` features; needs no training and no download.

    shortest, longest: lengths of the n-grams. Needs scikit-learn. Raises ValueError if a size is out of range.
    """

    width: int = 512
    shortest: int = 2
    longest: int = 4

    def __post_init__(self) -> None:
        sizes = f"width={quoted(self.width)}, shortest={quoted(self.shortest)}, longest={quoted(self.longest)}"
        if self.width < 1 or not 1 <= self.shortest <= self.longest:
            raise ValueError(f"{sizes} must be at least 1, and shortest at most longest")
        if self.width > MOST_WIDTH or self.longest > MOST_LONG:  # a vector and each n-gram of a chunk are in memory
            raise ValueError(f"{sizes} must be at most {MOST_WIDTH:,} features and {MOST_LONG} characters")

    @property
    def name(self) -> str:
        return f"ngrams:{self.width}:{self.shortest}:{self.longest}"

    @functools.cached_property
    def vectorizer(self) -> Any:
        try:
            from sklearn.feature_extraction.text import HashingVectorizer
        except ModuleNotFoundError:
            raise ValueError("hashed n-grams need scikit-learn: pip install 'jaxmodels[retro]'") from None
        lengths = (self.shortest, self.longest)
        return HashingVectorizer(analyzer="char", ngram_range=lengths, n_features=self.width, dtype=np.float32)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts to float32 [n, width]; a text shorter than the shortest n-gram becomes the zero vector.

        Raises ValueError for a text of more than MOST_GRAMS n-grams.
        """
        size = max(map(len, texts), default=0)
        if (count := size * (self.longest - self.shortest + 1)) > MOST_GRAMS:
            raise ValueError(
                f"embedder {self.name} takes texts of at most {MOST_GRAMS:,} n-grams; one of {size:,} characters has "
                f"{count:,}"
            )
        return self.vectorizer.transform(texts).toarray()


@dataclasses.dataclass(frozen=True)
class SentenceTransformer:
    """Model of the package sentence-transformers, by name or folder; needs the package and the weights."""

    model: str = "sentence-transformers/all-MiniLM-L6-v2"

    @property
    def name(self) -> str:
        return f"sentence:{self.model}"

    @functools.cached_property
    def loaded(self) -> Any:
        try:
            import sentence_transformers
        except ModuleNotFoundError:
            raise ValueError(f"embedder {self.name} needs: pip install sentence-transformers") from None
        import transformers

        folder = Path(self.model).is_dir()
        with loading(self), without_reports(transformers, progress=not folder), records_escaped():
            check_modules(self.model)
            self.tokenizers  # noqa: B018  # a bad one is refused before the library reads it
            loaded = sentence_transformers.SentenceTransformer(self.model, device="cpu", trust_remote_code=False)
            if folder:
                check_text_alone(loaded[0])
                check_weights(first_module(self.model), loaded[0])
            return loaded

    @functools.cached_property
    def tokenizers(self) -> list[TokenizerFile]:
        return confined_tokenizers(Path(self.model))

    @functools.cached_property
    def width(self) -> int:
        return int(self.embed(["a text"]).shape[1])

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        loaded = self.loaded
        prompt = loaded.prompts.get(loaded.default_prompt_name) or ""
        for confined in self.tokenizers:
            confined.encode_batch([prompt + text for text in texts])
        with one_line(f"embedder {self.name} cannot embed the texts"), calls_counted(loaded[0]):
            vectors = loaded.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return finite(self, np.asarray(vectors, np.float32))


@contextlib.contextmanager
def loading(embedder: "SentenceTransformer | BertMean") -> Iterator[None]:
    """Context in which a library loads a model: raises ValueError in one line, naming a damaged file of a folder."""
    with one_line(f"embedder {embedder.name} cannot be loaded"), offline(embedder.model):
        check_files(Path(embedder.model))
        yield


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Context in which an error of a library, of any kind and length, becomes a ValueError of one line."""
    try:
        yield
    except BaseException as error:  # from missing files and failed downloads to ids that a table lacks
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if reason.startswith("Weights only load failed"):  # and torch's advice how to run the code of a file
            reason = "its weights are not PyTorch files of tensors alone"
        raise ValueError(f"{what}: {shortened(reason, 500)}") from None


@contextlib.contextmanager
def calls_counted(model: Any) -> Iterator[None]:
    """Context in which a call of a model raises ValueError if it calls modules far more often than any published one.

    A configuration of a few bytes may have one stored layer called a million times.
    """
    calls = 0

    def count(module: Any, _: Any) -> None:
        nonlocal calls
        calls = 0 if module is model else calls + 1
        if calls > MOST_CALLS:
            raise ValueError(f"its config.json describes a model that calls modules more than {MOST_CALLS:,} times")

    handles = [module.register_forward_pre_hook(count) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def finite(embedder: "SentenceTransformer | BertMean", vectors: np.ndarray) -> np.ndarray:
    """The vectors of an embedder; raises ValueError if one is not finite, as with weights that are not."""
    if not np.isfinite(vectors).all():
        raise ValueError(f"embedder {embedder.name} gives vectors with NaN or infinities")
    return vectors


def check_text_alone(module: Any) -> None:
    """Raise ValueError if sentence-transformers gives a model anything but the tokens of a text.

    A text that begins as an address may be one of an image, and a chat template is a program.
    """
    kinds = set(getattr(module, "modality_config", None) or {"text"})
    if kinds != {"text"}:
        others = ", ".join(sorted(kinds - {"text"})) or "none"
        raise ValueError(f"it is a model of other inputs than texts: {others}, such as by a chat template")


def check_weights(folder: Path, module: Any) -> None:
    """Raise ValueError if transformers has to make up weights of the model in a folder.

    module: of sentence-transformers, with a model of the class that it takes, such as the encoder of T5 alone.
    """
    model = getattr(module, "auto_model", None) or module.model
    _, found = type(model).from_pretrained(
        folder, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True
    )
    check_complete(found)


def check_complete(found: Mapping[str, Any]) -> None:
    """Raise ValueError if transformers had to make up weights of a model; the pooler's are not used here."""
    missing = [name for name in found["missing_keys"] if not name.startswith("pooler.")]
    misshapen = [str(one[0]) if isinstance(one, tuple) else str(one) for one in found["mismatched_keys"]]
    if missing or misshapen:
        said = [f"missing {name}" for name in sorted(missing)] + [f"misshapen {name}" for name in sorted(misshapen)]
        raise ValueError(f"its weights are not those of its config.json: {listed(said)}")


@contextlib.contextmanager
def offline(model: str) -> Iterator[None]:
    """Context in which huggingface_hub uses no network if a model is a folder: its files may name others on the Hub."""
    if not Path(model).is_dir():
        yield
        return
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@dataclasses.dataclass(frozen=True)
class BertMean:
    """Mean of BERT's last hidden states over a text's tokens, as in the original implementation; by name or folder.

    The first and last word of a chunk, which may be cut, are left out if there are others. Needs transformers, torch
    and the weights.
    """

    model: str = "bert-base-uncased"

    @property
    def name(self) -> str:
        return f"bert:{self.model}"

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any]:
        try:
            import transformers
        except ModuleNotFoundError:
            raise ValueError(f"embedder {self.name} needs: pip install transformers torch") from None
        named = not Path(self.model).is_dir()  # which is downloaded
        with loading(self), without_reports(transformers, progress=named):
            self.tokenizers  # noqa: B018  # a bad one is refused before the library reads it
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.model, trust_remote_code=False)
            model, found = transformers.AutoModel.from_pretrained(
                self.model, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True
            )
            check_complete(found)
            return tokenizer, model.eval().requires_grad_(False)

    @functools.cached_property
    def tokenizers(self) -> list[TokenizerFile]:
        return confined_tokenizers(Path(self.model))

    @functools.cached_property
    def width(self) -> int:
        return int(self.embed(["a text"]).shape[1])

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        tokenizer, model = self.loaded
        words = [whole_words(text) for text in texts]
        for confined in self.tokenizers:
            confined.encode_batch(words)
        with one_line(f"embedder {self.name} cannot embed the texts"), calls_counted(model):
            tokens = tokenizer(words, return_tensors="pt", padding=True, truncation=True)
            hidden = model(**tokens).last_hidden_state.float().numpy()
            mask = tokens["attention_mask"].numpy()[..., None]
        with np.errstate(all="ignore"):
            mean = (hidden * mask).sum(axis=1) / mask.sum(axis=1)
            return finite(self, (mean / np.linalg.norm(mean, axis=1, keepdims=True)).astype(np.float32))


def whole_words(text: str) -> str:
    """Text without its first and last word, if it has more than two."""
    words = text.split()
    return " ".join(words[1:-1]) if len(words) > 2 else text.strip()


def embedder_of(name: str) -> Embedder:
    """Embedder by name: ngrams (with default sizes), ngrams:WIDTH:SHORTEST:LONGEST, sentence:MODEL, bert:MODEL.

    Raises ValueError if the name has another form.
    """
    kind, _, rest = name.partition(":")
    match kind:
        case "ngrams" if not rest:
            return HashedNGrams()
        case "ngrams" if rest.count(":") == 2 and rest.replace(":", "").isdecimal():
            return HashedNGrams(*map(int, rest.split(":")))
        case "sentence":
            return SentenceTransformer(rest) if rest else SentenceTransformer()
        case "bert":
            return BertMean(rest) if rest else BertMean()
    forms = "ngrams, ngrams:WIDTH:SHORTEST:LONGEST, sentence:MODEL or bert:MODEL"
    raise ValueError(f"embedder={quoted(name)} must be {forms}")
