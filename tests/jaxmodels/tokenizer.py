"""Byte-level tokenizer for tests, trained here."""

import functools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxmodels.text import END_OF_TEXT, load_corpus


def byte_level_tokenizer() -> Tokenizer:
    """Tokenizer of 300 tokens with <|endoftext|>; every call returns a new one, which a test may change."""
    return Tokenizer.from_str(trained())


@functools.cache
def trained() -> str:
    """The tokenizer as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([load_corpus("python_docs")[:20_000]], trainer)
    return tokenizer.to_str()
