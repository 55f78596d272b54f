"""Tokenizers, vocabularies, corpora, prompts and settings."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.targets.kind import Target


def tokenizer() -> Any:
    """A small tokenizer with every part that published ones have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary = {text: i for i, text in enumerate(["<|endoftext|>", *"abcdefghijklmnopqrs", "ab"])}
    made = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder, made.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=True)
    made.add_special_tokens(["<|endoftext|>"])
    return made


def make_tokenizer(folder: Path) -> None:
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "add_prefix_space": False}))


def make_rich_tokenizer(folder: Path) -> None:
    """With a normalizer, a template, byte fallback, truncation and padding."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers, processors

    made = tokenizer()
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " ")])
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\d"), "isolated"), made.pre_tokenizer])
    made.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.enable_truncation(7)
    made.enable_padding(length=11)
    made.save(str(folder / "tokenizer.json"))


def read_tokenizer(folder: Path) -> Any:
    from jaxmodels.text import TokenizerFile

    vocabulary = TokenizerFile.read(folder / "tokenizer.json")
    special = vocabulary.special, vocabulary.n_model, vocabulary.is_byte(3)
    return len(vocabulary), special, vocabulary.encode_prompt("abc"), vocabulary.decode(vocabulary.encode("abc ab"))


def make_vocab(folder: Path) -> None:
    tokenizer().model.save(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"unk_token": "a"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<|more|>": 21}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))


def read_vocab(folder: Path) -> Any:
    from jaxmodels.text import TokenizerFile

    vocabulary = TokenizerFile.read(folder)
    return len(vocabulary), vocabulary.eos, vocabulary.decode(vocabulary.encode("abc"))


def make_vocabularies(folder: Path) -> None:
    from jaxmodels.text import ByteVocabulary, CharVocabulary, TokenizerFile

    CharVocabulary("abc\n").save(folder / "characters.json")
    ByteVocabulary().save(folder / "bytes.json")
    TokenizerFile(tokenizer().to_str()).save(folder / "tokens.json")


def read_vocabularies(folder: Path) -> Any:
    from jaxmodels.text import load_vocabulary

    found = [load_vocabulary(folder / f"{name}.json") for name in ("characters", "bytes", "tokens")]
    return [(len(one), one.special, one.decode(np.arange(min(2, len(one))))) for one in found]


def make_tokens(folder: Path) -> None:
    from jaxmodels.text import CharVocabulary
    from jaxmodels.text.tokens import write

    text = "to be or not to be " * 9
    write(folder / "tokens", text, CharVocabulary.of(text))


def read_tokens(folder: Path) -> Any:
    from jaxmodels.text.tokens import open_tokens

    tokens = open_tokens(str(folder / "tokens"))
    return tokens.vocabulary.decode(np.array(tokens.train)), np.array(tokens.validation)


def make_sources(folder: Path) -> None:
    """Documents in every format, in a folder each."""
    import pyarrow
    from pyarrow import parquet

    texts = ["to be", "or not", "", "to be é\r\n", None, "that is"]
    for kind in ("jsonl", "arrow", "stream", "parquet"):
        (folder / kind).mkdir()
    rows = [json.dumps({"text": text, "id": i}) for i, text in enumerate(texts) if text is not None]
    (folder / "jsonl" / "train.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "jsonl" / "validation.jsonl").write_text(rows[0] + "\n")
    table = pyarrow.table({"text": texts, "id": list(range(len(texts)))})
    with pyarrow.ipc.new_file(folder / "arrow" / "a.arrow", table.schema) as file:
        file.write_table(table)
    encoded = table.set_column(0, "text", table.column("text").dictionary_encode())
    with pyarrow.ipc.new_stream(folder / "stream" / "a.arrow", encoded.schema) as stream:
        stream.write_table(encoded)
    parquet.write_table(table, folder / "parquet" / "a.parquet")


def read_sources(folder: Path) -> Any:
    from jaxmodels.text.sources import open_sources
    from jaxmodels.text.tokens import vocabulary_of

    found, refused = [], []
    for kind in ("jsonl", "arrow", "stream", "parquet"):
        try:
            found.append(vocabulary_of(open_sources(str(folder / kind)), "chars"))
        except ValueError as error:
            refused.append(error)
    if refused:
        raise refused[0]
    return found


def make_documents(folder: Path) -> None:
    (folder / "text.txt").write_text("to be or not to be\n" * 3)
    (folder / "lines.jsonl").write_text('{"text": "to be"}\n\n{"text": "or not", "id": 7}\n')


def read_documents(folder: Path) -> Any:
    from jaxmodels.scoring.files import read_documents

    return [*read_documents(str(folder / "text.txt")), *read_documents(str(folder / "lines.jsonl"), "text")]


def make_settings(folder: Path) -> None:
    """Texts that are arguments of a command or a function, a line each."""
    (folder / "biases.txt").write_text("13=-2.5\n7=-inf\n2=0\n")
    (folder / "layouts.txt").write_text("(h three d) i -> three h i d | h=1, three=3\n... o i -> ... i o\n")
    (folder / "prompt.txt").write_text("to be\r\n")


def read_settings(folder: Path) -> Any:
    """The readers of arguments name no file; here the file is added to their errors."""
    from jaxmodels.generate.command import read_prompt, settings_of
    from jaxmodels.io.bounded import read_bytes
    from parity.compare.weights.layout import Layout

    biases, layouts = (read_bytes(folder / f"{name}.txt", 10**7) for name in ("biases", "layouts"))
    sampling = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None, "repetition_penalty": 1.0}
    try:
        found = settings_of(argparse.Namespace(logit_bias=biases.decode("utf-8", "replace").splitlines(), **sampling))
        for text in layouts.decode("utf-8", "replace").splitlines():
            layout = Layout.parse(text)
            rank = len(layout.flax) - (("...",) in layout.flax)
            axes = layout.fit((6, 5), [None] * rank)
            axes.to_torch(axes.to_flax(np.zeros((6, 5))))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return found, read_prompt(folder / "prompt.txt")


TARGETS = (
    Target("tokenizer", make_tokenizer, read_tokenizer),
    Target("tokenizer, rich", make_rich_tokenizer, read_tokenizer),
    Target("vocab.json and merges.txt", make_vocab, read_vocab),
    Target("vocabularies", make_vocabularies, read_vocabularies),
    Target("tokens", make_tokens, read_tokens),
    Target("sources", make_sources, read_sources, "*.*"),
    Target("sources, Arrow", make_sources, read_sources, "*.arrow"),
    Target("sources, Parquet", make_sources, read_sources, "*.parquet"),
    Target("documents", make_documents, read_documents, "*.*"),
)
