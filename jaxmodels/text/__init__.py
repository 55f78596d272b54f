"""Text corpora, and vocabularies: characters, bytes, tokenizer files."""

from jaxmodels.text.corpora import load_corpus, split
from jaxmodels.text.tokenizer.files import (
    SLOW_NAMES,
    TOKENIZER_NAMES,
    TokenizerFile,
    as_vocabulary,
    find_tokenizer,
    load_vocabulary,
)
from jaxmodels.text.tokenizer.special import END_OF_TEXT
from jaxmodels.text.vocabularies import ByteVocabulary, CharVocabulary, Vocabulary

__all__ = [
    "END_OF_TEXT",
    "SLOW_NAMES",
    "TOKENIZER_NAMES",
    "ByteVocabulary",
    "CharVocabulary",
    "TokenizerFile",
    "Vocabulary",
    "as_vocabulary",
    "find_tokenizer",
    "load_corpus",
    "load_vocabulary",
    "split",
]
