"""Tokenizers of many kinds, trained here on a few pages."""

import functools
from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from jaxmodels.text import load_corpus

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CLIP = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
DEEPSEEK = [
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]
SPICE = "Ünïcödé naïve café 日本語のテキスト。中文，标点。 don't WE'RE 1234567 <b>x</b>"
SPICE += (
    " ▁under_score\n\n\tTab  two   three\r\n한국어 टेक्स्ट 👩‍👩‍👧 e\u0301 \u00a0 ﬁ Ⅷ ½ ''quoted'' ``x`` A.B.C. $5.00\n"
)


def split(pattern: str, behavior: str = "isolated", *, invert: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior, invert=invert)


def byte_level(**options: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})


def byte_bpe(pre: pre_tokenizers.PreTokenizer | None, *norm: normalizers.Normalizer, **options: object) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**options))
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    if norm:
        tokenizer.normalizer = normalizers.Sequence(list(norm))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(tokenizer, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))


def trained(tokenizer: Tokenizer, trainer: trainers.Trainer) -> Tokenizer:
    tokenizer.train_from_iterator([load_corpus("python_docs")[:12_000], SPICE * 3], trainer)
    return tokenizer


def bert(**options: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(**options)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return trained(tokenizer, trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False))


def unigram(scheme: str, *norm: normalizers.Normalizer, whitespace: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    metaspace = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    words = [pre_tokenizers.WhitespaceSplit()] if whitespace else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*words, metaspace])
    if norm:
        tokenizer.normalizer = normalizers.Sequence(list(norm))
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    return trained(tokenizer, trainer)


def without_words(prefix: bool) -> Tokenizer:
    """A BPE as Llama 2's: no pre-tokenizer; spaces are ▁, one is prepended, merges stay inside words."""
    words = trained(metaspace_bpe(), trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False))
    words.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")]
    )
    words.pre_tokenizer = None if prefix else pre_tokenizers.Split(" ", "merged_with_previous")
    return words


def with_instructions() -> Tokenizer:
    """Tokenizer as Llama 2's, with added tokens that end in what a cut may follow elsewhere."""
    tokenizer = without_words(True)
    tokenizer.add_special_tokens(["[INST]", "[/INST]", "[PAD]"])
    return tokenizer


def metaspace_bpe(**options: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**options)
    return tokenizer


def unsplit_metaspace() -> Tokenizer:
    words = without_words(True)
    words.normalizer = None
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return words


def unsplit_unigram() -> Tokenizer:
    tokenizer = unigram("always")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    return tokenizer


def pythia() -> Tokenizer:
    tokenizer = byte_bpe(byte_level(add_prefix_space=False), normalizers.NFC())
    tokenizer.add_special_tokens(["<|endoftext|>", "<|padding|>"])
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in (2, 3, 4, 8)])
    return tokenizer


def added(tokenizer: Tokenizer) -> Tokenizer:
    """The same with tokens that strip, are words, or have spaces."""
    tokenizer.add_tokens(
        [
            AddedToken("the language", normalized=False),
            AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False),
            AddedToken("is", single_word=True, normalized=False),
            AddedToken(" of", single_word=True, normalized=False),
            AddedToken("Class", rstrip=True, normalized=True),
        ]
    )
    return tokenizer


def clip() -> Tokenizer:
    pre = pre_tokenizers.Sequence([split(CLIP, "removed", invert=True), byte_level()])
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700, end_of_word_suffix="</w>", special_tokens=["<unk>"], show_progress=False
    )
    return trained(tokenizer, trainer)


def falcon() -> Tokenizer:
    parts = [pre_tokenizers.Punctuation("contiguous"), byte_level(), pre_tokenizers.Digits(), split("[0-9][0-9][0-9]")]
    return byte_bpe(pre_tokenizers.Sequence(parts))


def words(tokenizer: Tokenizer) -> Tokenizer:
    return trained(tokenizer, trainers.WordLevelTrainer(vocab_size=300, special_tokens=["?"], show_progress=False))


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return words(tokenizer)


def characters() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    return trained(tokenizer, trainers.BpeTrainer(vocab_size=1, special_tokens=["<unk>"], show_progress=False))


ALBERT = [
    normalizers.Replace("``", '"'),
    normalizers.Replace("''", '"'),
    normalizers.NFKD(),
    normalizers.StripAccents(),
    normalizers.Lowercase(),
    normalizers.Replace(Regex(" {2,}"), " "),
]
MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: byte_bpe(byte_level()),
    "gpt2 with added tokens": lambda: added(byte_bpe(byte_level())),
    "roberta": lambda: byte_bpe(byte_level(add_prefix_space=True)),
    "pythia": pythia,
    "pythia with added tokens": lambda: added(pythia()),
    "llama3": lambda: byte_bpe(
        pre_tokenizers.Sequence([split(LLAMA3), byte_level(use_regex=False)]), ignore_merges=True
    ),
    "qwen": lambda: byte_bpe(
        pre_tokenizers.Sequence([split(LLAMA3.replace("{1,3}", "")), byte_level(use_regex=False)]), normalizers.NFC()
    ),
    "o200k": lambda: byte_bpe(pre_tokenizers.Sequence([split(O200K), byte_level(use_regex=False)])),
    "starcoder": lambda: byte_bpe(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level()])),
    "deepseek": lambda: byte_bpe(
        pre_tokenizers.Sequence([*(split(pattern) for pattern in DEEPSEEK), byte_level(use_regex=False)])
    ),
    "bloom": lambda: byte_bpe(pre_tokenizers.Sequence([split(BLOOM), byte_level(use_regex=False)])),
    "falcon": falcon,
    "clip": clip,
    "bert": lambda: bert(lowercase=True),
    "bert cased": lambda: bert(lowercase=False, strip_accents=False),
    "bert with added tokens": lambda: added(bert(lowercase=True)),
    "t5": lambda: unigram("always", normalizers.Replace(Regex(" {2,}"), " "), whitespace=True),
    "albert": lambda: unigram("always", *ALBERT),
    "unigram, first": lambda: unigram("first", normalizers.NFKC()),
    "unigram, never": lambda: unigram("never", normalizers.Nmt(), normalizers.NFKC()),
    "llama2": lambda: without_words(True),
    "llama2 with instructions": with_instructions,
    "gemma": lambda: without_words(False),
    "mistral": unsplit_metaspace,
    "words": word_level,
    "characters": characters,
    "strip": lambda: byte_bpe(byte_level(), normalizers.Strip()),
    "xlm-r": lambda: unigram("always", normalizers.Strip(left=False), normalizers.Replace(Regex(" {2,}"), "▁")),
    "merges over spaces, and a strip": lambda: byte_bpe(byte_level(use_regex=False), normalizers.Strip()),
    "merges over spaces": lambda: byte_bpe(byte_level(use_regex=False)),
}
# Tokenizers whose texts have no place to cut.
UNCUT: dict[str, Callable[[], Tokenizer]] = {
    "words without a pre-tokenizer": lambda: words(Tokenizer(models.WordLevel(unk_token="?"))),
    "unigram without words": lambda: unsplit_unigram(),
    "look behind": lambda: byte_bpe(pre_tokenizers.Sequence([split(r"(?<=a)\s|\S+|\s+"), byte_level(use_regex=False)])),
}


@functools.cache
def made(name: str) -> Tokenizer:
    return (MAKERS | UNCUT)[name]()
