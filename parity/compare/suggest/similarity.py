"""How alike two names are, and which parts must never be exchanged whatever their shapes."""

import difflib
import functools
import re

from parity.compare.suggest.tree import Words

# Names that ports use for the same part.
WORDS = {
    "attention": "attn att self_attn selfattention self_attention mha",
    "cross": "crossattention cross_attn cross_attention encoder_attn encdecattention multihead_attn src_attn",
    "embed": "emb embedding embeddings wte embed_tokens word_embeddings embed_in tok token src",
    "position": "pos wpe positions position_embeddings embed_positions pos_embed pos_embedding",
    "norm": "ln layernorm layer_norm norm rmsnorm input_layernorm",
    "query": "q q_proj wq q_lin",
    "key": "k k_proj wk k_lin",
    "value": "v v_proj wv v_lin",
    "output": "o out o_proj out_proj wo proj out_lin dense c_proj",
    "up": "fc fc1 fc_in up_proj lin1 linear1 dense_h_to_4h intermediate wi c_fc",
    "down": "fc2 fc_out down_proj lin2 linear2 dense_4h_to_h",
    "gate": "gate_proj wi_0",
    "layer": "h layers blocks block l encoderblock stage stages",
    "mlp": "ffn ff ffw feed_forward feedforward ff_n",
    "head": "lm_head generator readout classifier score embed_out logits",
    "final": "f ln_f last",
    "weight": "weight_v kernel",
    "magnitude": "weight_g",
}
CANONICAL = {word: name for name, words in WORDS.items() for word in (name, *words.split())}
# Last words of arrays: they tell the kind of an array, not which one it is.
SUFFIX = {"weight", "kernel", "embedding", "scale", "w", "table"}
BIAS = {"bias", "b", "beta"}
ALIKE = 0.6  # names that share fewer letters are not alike


@functools.lru_cache(maxsize=100_000)
def tokens(words: Words) -> Words:
    """The words and numbers of a path in one vocabulary: ('h', '3', 'ln_1') -> ('layer', '3', 'norm', '1')."""
    found: list[str] = []
    for word in words:
        lower = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", word).lower()
        if lower in CANONICAL or lower.replace("_", "") in CANONICAL:
            found.append(CANONICAL.get(lower) or CANONICAL[lower.replace("_", "")])
            continue
        found += [CANONICAL.get(part, part) for part in re.findall(r"[a-z]+|\d+", lower)]
    return tuple(found)


def meaningful(words: Words) -> Words:
    """A path without the word that only tells the kind of array."""
    return words[:-1] if len(words) > 1 and words[-1] in SUFFIX | BIAS else words


@functools.lru_cache(maxsize=100_000)
def similarity(one: Words, other: Words) -> float:
    """How alike two paths are: 3 if they are equal, else up to 2."""
    if one == other:
        return 3.0
    one, other = meaningful(one), meaningful(other)
    a, b = tokens(one), tokens(other)
    if a == b:
        return 2.5
    last = 1.0 if same_end(one, other) else 0.5 * ratio(tokens(one[-1:]), tokens(other[-1:]))
    words = [{token for token in side if not token.isdigit()} for side in (a, b)]
    numbers = [[token for token in side if token.isdigit()] for side in (a, b)]
    shared = len(words[0] & words[1]) / max(1, len(words[0] | words[1]))
    return last + 0.5 * shared + 0.5 * (numbers[0] == numbers[1])


def ratio(a: Words, b: Words) -> float:
    """How alike the letters of two names are, from 0 to 1; numbers do not count, nor a few common letters."""
    one, other = ("".join(w for w in words if not w.isdigit()) for words in (a, b))
    found = difflib.SequenceMatcher(None, one, other).ratio() if one and other else 0.0
    return found if found >= ALIKE else 0.0


def same_end(one: Words, other: Words) -> bool:
    """True if the last words mean the same."""
    if not one or not other:
        return one == other
    return tokens(one[-1:]) == tokens(other[-1:])


@functools.lru_cache(maxsize=100_000)
def roles(path: str) -> frozenset[str]:
    """Roles that a path names: encoder, decoder, cross-attention, bias."""
    words = path.split(".")
    found = {word for word in words if word in ("encoder", "decoder")}
    if any("cross" in tokens((word,)) for word in words):
        found.add("cross")
    return frozenset(found)


def exchanged(one: str, other: str, cross: bool) -> bool:
    """True if one path is in an encoder and the other in a decoder.

    cross: both models name their cross-attentions; then those are never paired with anything else either.
    """
    a, b = roles(one), roles(other)
    sides = {"encoder", "decoder"}
    if len(a & sides) == 1 and len(b & sides) == 1 and a & sides != b & sides:
        return True
    return cross and ("cross" in a) != ("cross" in b)
