"""Settings of sampling, and the choice of the next token from logits.

Axes: B rows, V vocabulary. Settings have the meanings and the order of transformers' logits processors: bias,
repetition penalty, temperature, top-k, top-p, min-p.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.process.texts import quoted

SMALLEST = float(np.finfo(np.float32).tiny)  # XLA flushes smaller numbers to 0
LARGEST = 1 / SMALLEST  # XLA may multiply by the reciprocal
DRAWING = ("top_k", "top_p", "min_p")  # settings that have no effect on the most likely token


class Knobs(NamedTuple):
    """Settings as arrays, which change without another compilation; None for those that are off."""

    temperature: jax.Array | None
    top_p: jax.Array | None
    min_p: jax.Array | None
    penalty: jax.Array | None
    bias: jax.Array | None  # [V]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature: 0 is greedy. Above 0, tokens are drawn from the softmax of logits / temperature.
    top_k: draw from the k most likely tokens. top_p: draw from the fewest tokens whose probabilities reach p.
    min_p: draw from the tokens with at least min_p times the probability of the most likely one.
    repetition_penalty: divides the positive logits, and multiplies the negative ones, of tokens in the text so far,
        prompt included; above 1 discourages repetition, 1 is off.
    logit_bias: token id -> number added to its logit; -inf excludes the token.

    Raises ValueError, naming the setting, if a value has another type or is out of range, or if a setting of drawing is
    given without a temperature.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        def set_to(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        set_to("temperature", number("temperature", self.temperature, "0 (greedy) or more, and finite"))
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or more, and finite")
        for name, lowest in (("top_p", "above 0"), ("min_p", "at least 0")):
            allowed = f"a number {lowest} and at most 1"
            given = getattr(self, name)
            if given is not None:
                set_to(name, value := number(name, given, allowed))
                if not 0 <= value <= 1 or (value == 0 and name == "top_p"):
                    raise ValueError(f"{name}={given} must be {allowed}")
        if self.top_k is not None:
            set_to("top_k", integer("top_k", self.top_k))
        penalty = number("repetition_penalty", self.repetition_penalty, "above 0 and finite")
        if not 0 < penalty < math.inf:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be above 0 and finite")
        set_to("repetition_penalty", penalty)
        set_to("logit_bias", biases(self.logit_bias))
        given = [f"{name}={getattr(self, name)}" for name in DRAWING if getattr(self, name) is not None]
        if given and not self.temperature:
            raise ValueError(f"{', '.join(given)} must come with a temperature above 0")

    @property
    def is_greedy(self) -> bool:
        """True if the most likely token is taken; also at temperatures that float32 cannot hold."""
        return self.temperature < SMALLEST

    def knobs(self, n_vocab: int) -> Knobs:
        """Settings as arrays for a vocabulary; raises ValueError if logit_bias has an id outside it or excludes all."""
        bias = None
        if self.logit_bias:
            outside = sorted(i for i in self.logit_bias if not 0 <= i < n_vocab)
            if outside:
                raise ValueError(f"logit_bias has ids {outside[:10]}, must be from 0 to {n_vocab - 1}")
            values = np.zeros(n_vocab, np.float32)
            for token, value in self.logit_bias.items():
                values[token] = np.clip(value, -LARGEST, LARGEST) if value > -math.inf else -math.inf
            if not (values > -math.inf).any():
                raise ValueError(f"logit_bias excludes all {n_vocab} tokens; at least one must be left")
            bias = jnp.asarray(values)
        penalty = None if self.repetition_penalty == 1 else float32(self.repetition_penalty)
        if self.is_greedy:
            return Knobs(None, None, None, penalty, bias)
        top_p = None if self.top_p in (None, 1.0) else float32(self.top_p)
        min_p = None if not self.min_p else float32(self.min_p)
        return Knobs(float32(self.temperature), top_p, min_p, penalty, bias)


def float32(value: Any) -> jax.Array:
    """Scalar array, kept within the normal numbers of float32."""
    return jnp.asarray(min(max(value, SMALLEST), LARGEST), jnp.float32)


def number(name: str, value: Any, allowed: str) -> float:
    """Convert a setting to float; raises ValueError if it is not a real number, or NaN."""
    found = value.item() if getattr(value, "ndim", None) == 0 else value  # of a NumPy or JAX scalar
    try:
        result = math.nan if isinstance(found, bool) or not isinstance(found, numbers.Real) else float(found)
    except OverflowError:  # an int beyond float64
        result = math.inf
    if math.isnan(result):
        raise ValueError(f"{name}={value!r} must be {allowed}")
    return result


def integer(name: str, value: Any, smallest: int = 1) -> int:
    """Convert a setting to int; raises ValueError if it is not an integer from `smallest` to 2³¹ - 1."""
    found = value.item() if getattr(value, "ndim", None) == 0 else value
    if isinstance(found, bool) or not isinstance(found, numbers.Integral) or found < smallest:
        raise ValueError(f"{name}={value!r} must be an integer of at least {smallest}")
    if int(found) >= 2**31:
        raise ValueError(f"{name}={quoted(value)} must be at most {2**31 - 1}")
    return int(found)


def biases(given: Any) -> dict[int, float] | None:
    """Check and convert `logit_bias`."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise ValueError(f"logit_bias={given!r} must map token ids to numbers, such as {{13: -2.5}}")
    found = {}
    for token, value in given.items():
        bias = number(f"logit_bias[{token!r}]", value, "a number, or -inf to exclude the token")
        if bias == math.inf:
            raise ValueError(f"logit_bias[{token!r}]={value} must be a number, or -inf to exclude the token")
        found[integer("logit_bias: id", token, 0)] = bias
    return found


def processed(logits: jax.Array, knobs: Knobs, top_k: int | None = None, seen: jax.Array | None = None) -> jax.Array:
    """Logits [B, V] as the settings change them, in float32 at least; excluded tokens are -inf.

    seen: bool [B, V], tokens of the text so far, for the repetition penalty. With a temperature, each row's largest
    logit is subtracted first: a quotient by a small temperature would overflow.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if knobs.bias is not None:
        logits = logits + knobs.bias
    if knobs.penalty is not None:
        assert seen is not None, "the penalty needs the tokens of the text"
        logits = jnp.where(seen, jnp.where(logits < 0, logits * knobs.penalty, logits / knobs.penalty), logits)
    if knobs.temperature is None:
        return logits
    peak = logits.max(axis=-1, keepdims=True)
    logits = (logits - jnp.where(jnp.isfinite(peak), peak, 0)) / knobs.temperature
    if top_k is not None and top_k < logits.shape[-1]:
        likely = jax.lax.top_k(logits, top_k)[1]  # by index, so that ties keep exactly k tokens
        kept = jnp.zeros(logits.shape, bool).at[jnp.arange(len(logits))[:, None], likely].set(True)
        logits = jnp.where(kept, logits, -jnp.inf)
    if knobs.top_p is not None:
        logits = jnp.where(nucleus(jax.nn.softmax(logits), knobs.top_p), logits, -jnp.inf)
    if knobs.min_p is not None:
        peak = logits.max(axis=-1, keepdims=True)
        logits = jnp.where(logits - peak < jnp.log(knobs.min_p), -jnp.inf, logits)
    return logits


def drawable(logits: jax.Array, processed: jax.Array) -> jax.Array:
    """Mask [B]: whether a model's logits [B, V] are neither NaN nor +inf, and the processed ones leave a token to draw.

    The maximum alone would not tell: XLA drops NaN from that of a large array on CPUs.
    """
    return (logits < jnp.inf).all(axis=-1) & jnp.isfinite(processed.max(axis=-1))


def nucleus(probabilities: jax.Array, top_p: jax.Array) -> jax.Array:
    """Mask [B, V] of the fewest tokens whose probabilities [B, V] reach top_p; the first ones among equals.

    A token is kept if those more likely do not reach top_p. The smallest such probability is found by bisection over
    the bits of a float32, which are ordered as the numbers are: on a CPU, a sort takes ten times longer.
    """
    bits = jax.lax.bitcast_convert_type(probabilities.astype(jnp.float32), jnp.int32)  # of numbers ≥ 0

    def above(bound: jax.Array) -> jax.Array:
        return jnp.where(bits > bound, probabilities, 0).sum(axis=-1, keepdims=True)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # `high` is kept, `low` is not
        middle = low + (high - low) // 2
        kept = above(middle) < top_p
        return jnp.where(kept, low, middle), jnp.where(kept, middle, high)

    low = jnp.full((len(bits), 1), -1, jnp.int32)
    _, least = jax.lax.fori_loop(0, 31, halve, (low, bits.max(axis=-1, keepdims=True)))
    equal = bits == least
    before = above(least) + jnp.where(equal, jnp.cumsum(equal, axis=-1) - 1, 0) * probabilities
    return (bits > least) | (equal & (before < top_p))


def draw(logits: jax.Array, knobs: Knobs, keys: jax.Array) -> jax.Array:
    """One token for each row of processed logits [B, V] -> int32 [B]; keys: one for each row."""
    if knobs.temperature is None:
        return logits.argmax(axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
