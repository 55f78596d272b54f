"""What makes chunks of text comparable: texts in, vectors out, so that near vectors are texts alike.

An embedder has a `width`, a `name` that says everything its vectors depend on (an index remembers it), and
`embed(texts) -> float32 [n, width]`, each row of length 1 or 0: an inner product is then the cosine.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Embedder(Protocol):
    """Anything of this form can be given to an index."""

    @property
    def name(self) -> str: ...

    @property
    def width(self) -> int: ...

    def embed(self, texts: Sequence[str]) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class HashedNGrams:
    """Counts of character n-grams, hashed to `width` features with signs: no training, no download, the same anywhere.

    shortest and longest are the n-grams' lengths. Needs scikit-learn. Raises ValueError for sizes that cannot be.
    """

    width: int = 512
    shortest: int = 2
    longest: int = 4

    def __post_init__(self):
        if self.width < 1 or not 1 <= self.shortest <= self.longest:
            raise ValueError(
                f"width={self.width}, shortest={self.shortest}, longest={self.longest}: all must be at least 1, and "
                "shortest not above longest"
            )

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
        """float32 [n, width]; a text shorter than the shortest n-gram is the zero vector."""
        return self.vectorizer.transform(texts).toarray()


@dataclasses.dataclass(frozen=True)
class SentenceTransformer:
    """A model of the sentence-transformers package, by name or folder; needs the package and the weights."""

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
        try:
            return sentence_transformers.SentenceTransformer(self.model, device="cpu")
        except Exception as error:  # of many kinds, from missing files to failed downloads
            raise ValueError(f"embedder {self.name} cannot be loaded: {str(error).partition(chr(10))[0]}") from None

    @property
    def width(self) -> int:
        newer = getattr(self.loaded, "get_embedding_dimension", None)
        return newer() if newer else self.loaded.get_sentence_embedding_dimension()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.asarray(
            self.loaded.encode(list(texts), normalize_embeddings=True, show_progress_bar=False), np.float32
        )


@dataclasses.dataclass(frozen=True)
class BertMean:
    """The mean of BERT's last hidden states over a text's tokens, as in the original's scripts; by name or folder.

    A chunk's first and last word, which may be cut, are left out where there are others. Needs transformers, torch and
    the weights.
    """

    model: str = "bert-base-uncased"

    @property
    def name(self) -> str:
        return f"bert:{self.model}"

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any]:
        try:
            import transformers

            tokenizer = transformers.AutoTokenizer.from_pretrained(self.model)
            model = transformers.AutoModel.from_pretrained(self.model).eval().requires_grad_(False)
        except ModuleNotFoundError:
            raise ValueError(f"embedder {self.name} needs: pip install transformers torch") from None
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(f"embedder {self.name} cannot be loaded: {str(error).partition(chr(10))[0]}") from None
        return tokenizer, model

    @property
    def width(self) -> int:
        return self.loaded[1].config.hidden_size

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        tokenizer, model = self.loaded
        tokens = tokenizer([whole_words(text) for text in texts], return_tensors="pt", padding=True, truncation=True)
        hidden = model(**tokens).last_hidden_state.numpy()
        mask = tokens["attention_mask"].numpy()[..., None]
        mean = (hidden * mask).sum(axis=1) / mask.sum(axis=1)
        return (mean / np.linalg.norm(mean, axis=1, keepdims=True)).astype(np.float32)


def whole_words(text: str) -> str:
    """A text without its first and last word, where it has more than these."""
    words = text.split()
    return " ".join(words[1:-1]) if len(words) > 2 else text.strip()


def embedder_of(name: str) -> Embedder:
    """The embedder with a name: ngrams (with its defaults), ngrams:WIDTH:SHORTEST:LONGEST, sentence:MODEL, bert:MODEL.

    Raises ValueError for another name.
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
    raise ValueError(f"embedder={name!r} is none of ngrams, ngrams:WIDTH:SHORTEST:LONGEST, sentence:MODEL, bert:MODEL")
