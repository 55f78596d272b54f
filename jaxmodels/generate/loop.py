"""The decoding loop, for every model with the members of `jaxmodels.protocols.LanguageModel`.

Axes: S prompt tokens, n new tokens, B rows, V vocabulary. Inside this module ids are [S, B].
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from jaxmodels.generate.sampling import Knobs, Sampling, draw, drawable, integer, processed
from jaxmodels.protocols import LanguageModel, check_decoding

MIN_SLOTS = 256  # each cache size compiles another loop, which costs more than a smaller cache saves
SLOTS = 64  # numbers of slots are multiples, so that texts of similar lengths share a compiled loop
# Operations that a CUDA graph may hold: XLA's default, and loops, whose kernels the host otherwise launches one by one.
GRAPHED = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"


NOT_FINITE = "the model's logits are NaN or infinite: its weights and activations must be finite"


class Fixed(NamedTuple):
    """Static arguments of the compiled functions."""

    n_vocab: int
    top_k: int | None = None
    stop_tokens: tuple[int, ...] = ()


class State(NamedTuple):
    """Arrays that the loop carries."""

    i: jax.Array  # int32, number of new tokens so far
    out: jax.Array  # int32 [n, B]
    done: jax.Array  # bool [B]; these rows repeat their last token
    finite: jax.Array  # bool; False if a token was drawn from logits that are NaN, infinite or all excluded
    seen: jax.Array | None  # bool [B, V], for the repetition penalty
    cache: Any  # packed


# The state; the last tokens int32 [B], -1 if logits were not finite; True if all rows are done.
Output = tuple[State, jax.Array, jax.Array]


class Compiled(NamedTuple):
    """Compiled functions of a model's structure; they take the model's arrays as a list.

    begin: read a prompt and draw a token. proceed: draw tokens until a number of them is written or all rows are done.
    """

    begin: Callable[..., Output]
    proceed: Callable[..., Output]


def loop_options() -> dict[str, str] | None:
    """Value of `compiler_options` for the jit of a decoding loop; None where the default backend needs none.

    On CUDA devices a loop becomes one CUDA graph: a token takes hundreds of kernels of a few microseconds each, and
    launching them one by one can take longer than running them.
    """
    backend = jax.extend.backend.get_backend()
    return {"xla_gpu_enable_command_buffer": GRAPHED} if "cuda" in backend.platform_version else None


@functools.lru_cache(maxsize=64)
def compiled(structure: Any, fixed: Fixed) -> Compiled:
    """Functions for models of one structure (`jax.tree.structure`). jit would flatten a module again for each call."""

    def write(state: State, logits: jax.Array, keys: jax.Array, knobs: Knobs) -> State:
        i, out, done, finite, seen, cache = state
        logits = logits[:, : fixed.n_vocab]
        scores = processed(logits, knobs, fixed.top_k, seen)
        token = draw(scores, knobs, jax.vmap(jax.random.fold_in, (0, None))(keys, i))
        finite &= (drawable(logits, scores) | done).all()
        token = jnp.where(done, out[i - 1], token)
        if fixed.stop_tokens:
            done |= jnp.isin(token, jnp.asarray(fixed.stop_tokens, jnp.int32))
        if seen is not None:
            seen = seen.at[jnp.arange(len(token)), token].set(True)
        return State(i + 1, out.at[i].set(token), done, finite, seen, cache)

    def output(state: State) -> Output:
        return state, jnp.where(state.finite, state.out[state.i - 1], -1), state.done.all()

    def begin(
        weights: list[jax.Array], ids: jax.Array, cache: Any, state: State, keys: jax.Array, knobs: Knobs
    ) -> Output:
        model = jax.tree.unflatten(structure, weights)
        logits, cache = model.prefill(ids if model.sequence_axis == 0 else ids.T, cache)  # [B, V]
        copies = len(state.done) // len(logits)
        logits, cache = jnp.repeat(logits, copies, axis=0), cache.repeated(copies).packed()
        return output(write(state._replace(cache=cache), logits, keys, knobs))

    def proceed(weights: list[jax.Array], state: State, end: jax.Array, keys: jax.Array, knobs: Knobs) -> Output:
        model = jax.tree.unflatten(structure, weights)
        axis = model.sequence_axis

        def unfinished(state: State) -> jax.Array:
            return (state.i < end) & ~state.done.all()

        def body(state: State) -> State:
            token = jnp.expand_dims(state.out[state.i - 1], axis)
            logits, cache = model.decode(token, state.cache.unpacked())
            return write(state._replace(cache=cache.packed()), jnp.take(logits, 0, axis=axis), keys, knobs)

        return output(jax.lax.while_loop(unfinished, body, state))

    return Compiled(jax.jit(begin), jax.jit(proceed, donate_argnames="state", compiler_options=loop_options()))


class Decoding:
    """Continuation of a batch of prompts, written in as many calls as wanted: one token each, or all at once.

    ids: int [S, B] or [B, S], by the model's `sequence_axis`. n: new tokens per row. copies: continuations of each
    prompt; their rows follow each other. start: int [B], number of left-padding ids. key: row r draws its token i with
    fold_in(fold_in(key, r), i). rows: int [B · copies], other numbers r; default 0, 1, …. n_tokens: size of the
    vocabulary without padding rows, which are never drawn.
    window: number of tokens that the model attends to. A longer text is continued from its last window // 2 tokens,
    whenever it has reached that length. Default: no limit but the model's.

    The prompt takes one pass. A cache grows in powers of two, so that a token's cost depends on its position and not on
    n. Raises ValueError if the model lacks a member of `LanguageModel`, if an argument is out of range, or if prompt
    and new tokens exceed the model's tables.
    """

    def __init__(
        self,
        model: LanguageModel,
        ids: Any,
        n: int,
        sampling: Sampling,
        *,
        copies: int = 1,
        stop_tokens: Sequence[int] = (),
        n_tokens: int | None = None,
        start: Any = None,
        key: jax.Array | None = None,
        rows: Sequence[int] | None = None,
        window: int | None = None,
    ):
        check_decoding(model)
        ids = matrix(ids)
        self.n = integer("max_new_tokens", n)
        copies = integer("num_return_sequences", copies)
        stops = tuple(integer("stop_tokens: id", token, 0) for token in stop_tokens)
        self.axis = model.sequence_axis
        # A scan over stacked layers would copy each layer's weights for every token.
        self.model = model.unstacked() if hasattr(model, "unstacked") else model
        self.prompt = ids if self.axis == 0 else ids.T  # [S, B]
        self.start = start
        self.window = window
        if start is not None and window is not None:
            raise ValueError("start must be None with a window")
        batch = self.prompt.shape[1]
        self.weights, structure = jax.tree.flatten(self.model)
        n_vocab = drawn_from(self.model, n_tokens)
        self.knobs = sampling.knobs(n_vocab)
        self.compiled = compiled(structure, Fixed(n_vocab, sampling.top_k, stops))
        numbers = np.arange(batch * copies) if rows is None else np.asarray(rows)
        key = jax.random.key(0) if key is None else key
        self.keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(numbers, jnp.uint32))
        self.written = 0
        self.open_segment(self.prompt)  # raises for `start`, before it is used to index
        check_vocabulary(n_vocab, np.asarray(self.prompt), start, stops)
        seen = None
        if self.knobs.penalty is not None:
            seen = jnp.repeat(tokens_of(self.prompt, start, n_vocab), copies, axis=0)
        rows_of = (batch * copies,)
        out = jnp.zeros((self.n, *rows_of), jnp.int32)
        self.state = State(jnp.int32(0), out, jnp.zeros(rows_of, bool), jnp.asarray(True), seen, None)
        self.prompt = jnp.repeat(self.prompt, copies, axis=1)
        self.last = out[0]  # int32 [B], the last token of each row
        self.all_done = jnp.asarray(False)

    def open_segment(self, ids: jax.Array) -> None:
        """Set out to read ids [S, B] with an empty cache; the last `window` // 2 of them if they fill the window."""
        first = self.written
        self.end = self.n  # of the segment
        if self.window is not None:
            if len(ids) >= self.window:
                ids = ids[-max(1, self.window // 2) :]
            self.end = min(self.n, first + max(1, self.window - len(ids)))
        self.ids: jax.Array | None = ids
        self.offset = len(ids) - first  # new token i is token offset + i of the segment
        length, batch = ids.shape
        self.total = admitted(self.model, batch, len(ids) + self.end - first)
        self.cache = self.model.init_cache(batch, min(self.total, capacity(length + 1)), start=self.start)
        self.cache.check_room(length, batch, empty=True)  # outside jit, where the values of start are known
        self.slots = self.room(self.cache)

    @staticmethod
    def room(cache: Any) -> float:
        return float("inf") if cache.is_ring else cache.max_len

    def advance(self, end: int | None = None) -> jax.Array:
        """Write tokens until there are `end` of them in each row (default: all), and return the last one, int32 [B].

        Rows that have drawn a stop token repeat it.
        """
        end = self.n if end is None else min(end, self.n)
        while self.written < end:
            if self.ids is None and self.written == self.end:
                if self.all_done:
                    break
                self.reopen()
            if self.ids is not None:  # a prompt to read
                state = self.state._replace(cache=None)
                self.put(self.compiled.begin(self.weights, self.ids, self.cache, state, self.keys, self.knobs))
                self.ids, self.cache = None, None
                self.written += 1
                continue
            if self.offset + self.written > self.slots:  # token i needs offset + i slots
                if self.all_done:
                    break
                self.grow()
            stop = int(min(end, self.end, self.slots - self.offset + 1))
            self.put(self.compiled.proceed(self.weights, self.state, jnp.int32(stop), self.keys, self.knobs))
            self.written = stop
        self.written = max(self.written, end)
        return self.last

    def advance_segment(self) -> jax.Array:
        """Write the tokens up to the next time that the text is read again, or all."""
        if self.ids is None and self.written == self.end < self.n:
            self.reopen()
        return self.advance(self.end)

    def reopen(self) -> None:
        """Set out to read the end of the text so far."""
        self.open_segment(jnp.concatenate([self.prompt, self.state.out[: self.written]]))

    def put(self, output: Output) -> None:
        self.state, self.last, self.all_done = output

    def grow(self) -> None:
        cache = self.state.cache.unpacked().grown(min(capacity(self.offset + self.written), self.total))
        self.slots = self.room(cache)
        self.state = self.state._replace(cache=cache.packed())

    def each(self) -> Iterator[np.ndarray]:
        """Iterate over the new tokens, int32 [B], until all rows have stopped or there are n.

        Raises ValueError like `tokens`.
        """
        token = self.advance(1)
        for i in range(2, self.n + 1):
            done, following = self.all_done, self.advance(i)  # dispatched before this token is fetched
            yield drawn(token)
            if done:
                return
            token = following
        yield drawn(token)

    def stop(self, rows: Any) -> None:
        """Let rows, bool [B], repeat their last token from now on."""
        done = self.state.done | jnp.asarray(rows)
        self.state, self.all_done = self.state._replace(done=done), done.all()

    def tokens(self) -> jax.Array:
        """Tokens written so far, int32 [written, B]. Raises ValueError if there was nothing to draw from."""
        if not self.state.finite:
            raise ValueError(NOT_FINITE)
        i, out = self.state.i, self.state.out
        # If every row stopped early, repeat the last tokens.
        out = jnp.where(jnp.arange(self.n)[:, None] < i, out, out[i - 1])
        return out[: self.written]


def drawn(token: jax.Array) -> np.ndarray:
    """Copy tokens to the host; raises ValueError if there was nothing to draw from."""
    found = np.asarray(token)
    if (found < 0).any():
        raise ValueError(NOT_FINITE)
    return found


def admitted(model: LanguageModel, batch: int, total: int) -> int:
    """`total` slots, or a few more if the model has them; raises ValueError if total exceeds its tables."""
    jax.eval_shape(lambda: model.init_cache(batch, total))
    more = -(-total // SLOTS) * SLOTS
    try:
        jax.eval_shape(lambda: model.init_cache(batch, more))
    except ValueError:
        return total
    return more


def capacity(tokens: int) -> int:
    """Number of cache slots for a number of tokens: the next power of two, MIN_SLOTS at least."""
    return max(MIN_SLOTS, 1 << (tokens - 1).bit_length())


def vocabulary_size(model: LanguageModel) -> int:
    """V of a model's logits."""
    weights, structure = jax.tree.flatten(model)
    return size_of_logits(structure, tuple((array.shape, array.dtype) for array in weights))


def drawn_from(model: LanguageModel, n_tokens: int | None) -> int:
    """Number of ids that tokens are drawn from: the first n_tokens, or all; raises ValueError if there are fewer."""
    n_vocab = vocabulary_size(model)
    if n_tokens is None:
        return n_vocab
    if not 1 <= integer("n_tokens", n_tokens, 0) <= n_vocab:
        raise ValueError(f"n_tokens={n_tokens} must be from 1 to the vocabulary size {n_vocab}")
    return int(n_tokens)


@functools.lru_cache(maxsize=64)
def size_of_logits(structure: Any, arrays: tuple[Any, ...]) -> int:
    """V of a model from the structure and the (shape, dtype) of its arrays."""
    weights = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arrays]

    def logits(weights: list[jax.Array]) -> jax.Array:
        model = jax.tree.unflatten(structure, weights)
        return model.prefill(jnp.zeros((1, 1), jnp.int32), model.init_cache(1, 1))[0]

    return jax.eval_shape(logits, weights).shape[-1]


def matrix(ids: Any) -> jax.Array:
    """Convert prompts to an array; raises ValueError if they are not a non-empty matrix of integers."""
    try:
        ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    except ValueError:
        raise ValueError("ids must be a matrix of integers; its rows have different lengths") from None
    if ids.ndim != 2 or 0 in ids.shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids must be a non-empty matrix of integers, got {ids.dtype}{list(ids.shape)}")
    if not isinstance(ids, jax.Array) and max(ids.max(), -ids.min()) > np.iinfo(np.int32).max:
        raise ValueError(f"ids from {ids.min()} to {ids.max()} must be within the vocabulary")
    return jnp.asarray(ids)


def check_vocabulary(n_vocab: int, text: np.ndarray, start: Any, stop_tokens: Sequence[int]) -> None:
    """Raises ValueError if an id of text [S, B] or a stop token is outside the vocabulary: logits would be NaN."""
    if start is not None:  # ids of the padding are not used
        text = text[np.arange(len(text))[:, None] >= np.asarray(start)]
    outside = sorted({int(i) for i in (*text[(text < 0) | (text >= n_vocab)], *stop_tokens) if not 0 <= i < n_vocab})
    if outside:
        raise ValueError(f"ids or stop_tokens {outside[:10]} must be from 0 to {n_vocab - 1}")


def tokens_of(ids: jax.Array, start: Any, n_vocab: int) -> jax.Array:
    """Mask bool [B, V] of the tokens in each column of ids [S, B], padding left out."""
    if start is not None:  # beyond the vocabulary, and dropped
        ids = jnp.where(jnp.arange(len(ids))[:, None] < jnp.asarray(start), n_vocab, ids)
    batch = ids.shape[1]
    return jnp.zeros((batch, n_vocab), bool).at[jnp.arange(batch), ids].set(True, mode="drop")
