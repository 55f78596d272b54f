"""Continuous batching: many prompts in a fixed number of rows; a row that ends makes room for the next prompt.

Axes: B rows, G prompts of a group, S prompt tokens, V vocabulary.

Prompts of similar lengths are read together, in a cache of their own, in which they wait for rows. Keys and values are
stored by position (`jaxmodels.cache`), and a row's position is `cache.length` - `cache.start`: a prompt of p tokens is
copied from that cache to row r, with start[r] = length - p. The other rows are not touched. Rows decode together until
one of them ends.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.generate.loop import (
    NOT_FINITE,
    Fixed,
    admitted,
    capacity,
    check_vocabulary,
    drawn_from,
    loop_options,
    tokens_of,
)
from jaxmodels.generate.sampling import Knobs, Sampling, draw, drawable, integer, processed
from jaxmodels.protocols import LanguageModel, check_decoding

SHORTEST = 16  # tokens to which prompts are padded at least; see `padded_length`
GROUPED = 1024  # padded tokens of prompts that are read together, at most; more are hardly faster


def padded_length(length: int) -> int:
    """Number of tokens to which a prompt is padded: 2ᵏ or 3·2ᵏ, so that few lengths are compiled."""
    power = max(SHORTEST, 1 << (length - 1).bit_length())
    return 3 * power // 4 if power > SHORTEST and length <= 3 * power // 4 else power


class State(NamedTuple):
    """Arrays that the loop carries."""

    i: jax.Array  # int32 [B], number of new tokens of each row's prompt
    n: jax.Array  # int32 [B], number at which a row ends
    last: jax.Array  # int32 [B]
    out: jax.Array  # int32 [B, n]
    done: jax.Array  # bool [B]; these rows are computed and not used
    finite: jax.Array  # bool; False if a token was drawn from logits that are NaN, infinite or all excluded
    keys: jax.Array  # [B], of each row's prompt
    seen: jax.Array | None  # bool [B, V], for the repetition penalty
    cache: Any


class Group(NamedTuple):
    """Prompts that were read together, and the first token of each."""

    token: jax.Array  # int32 [G]
    finite: jax.Array  # bool [G], as in `State`
    ended: jax.Array  # bool [G], True if the token ends the prompt's text
    seen: jax.Array | None  # bool [G, V]
    layers: Any  # of their cache


class Compiled(NamedTuple):
    """Compiled functions of a model's structure; `read` and `proceed` take the model's arrays as a list.

    read: read the prompts of a group and draw the first token of each. place: copy one of them to a row. proceed: draw
    tokens until a row ends, or a number of steps is done.
    """

    read: Callable[..., Group]
    place: Callable[..., State]
    proceed: Callable[..., State]


@functools.lru_cache(maxsize=64)
def compiled(structure: Any, fixed: Fixed) -> Compiled:
    """Functions for models of one structure; see `jaxmodels.generate.loop.compiled`."""

    def token_of(logits: jax.Array, keys: jax.Array, i: jax.Array, knobs: Knobs, seen: Any) -> tuple[jax.Array, ...]:
        """Tokens [B], and for each row whether there was something to draw from and whether it ends the row."""
        logits = logits[:, : fixed.n_vocab]
        scores = processed(logits, knobs, fixed.top_k, seen)
        token = draw(scores, knobs, jax.vmap(jax.random.fold_in)(keys, i))
        return token, drawable(logits, scores), jnp.isin(token, jnp.asarray(fixed.stop_tokens, jnp.int32))

    def read(weights: list[jax.Array], ids: jax.Array, start: jax.Array, keys: jax.Array, knobs: Knobs) -> Group:
        model = jax.tree.unflatten(structure, weights)
        cache = model.init_cache(len(ids), ids.shape[1], start=start)
        logits, cache = model.prefill(ids if model.sequence_axis == 1 else ids.T, cache)  # [G, V]
        seen = None if knobs.penalty is None else tokens_of(ids.T, start, fixed.n_vocab)
        token, finite, ended = token_of(logits, keys, jnp.zeros(len(ids), jnp.int32), knobs, seen)
        if seen is not None:
            seen = seen.at[jnp.arange(len(ids)), token].set(True)
        return Group(token, finite, ended, seen, cache.layers)

    def place(
        state: State, group: Group, k: jax.Array, row: jax.Array, length: jax.Array, n: jax.Array, key: jax.Array
    ) -> State:
        def copied(all_: jax.Array, some: jax.Array) -> jax.Array:
            one = jax.lax.dynamic_index_in_dim(some, k)
            return jax.lax.dynamic_update_slice(all_, one, (row, *[0] * (one.ndim - 1)))

        layers = jax.tree.map(copied, state.cache.layers, group.layers)
        start = state.cache.start.at[row].set(state.cache.length - length)
        return State(
            state.i.at[row].set(1),
            state.n.at[row].set(n),
            state.last.at[row].set(group.token[k]),
            state.out.at[row, 0].set(group.token[k]),
            state.done.at[row].set(group.ended[k] | (n <= 1)),
            state.finite & group.finite[k],
            state.keys.at[row].set(key),
            None if state.seen is None or group.seen is None else state.seen.at[row].set(group.seen[k]),
            dataclasses.replace(state.cache, layers=layers, start=start),
        )

    def proceed(weights: list[jax.Array], state: State, steps: jax.Array, knobs: Knobs) -> State:
        model = jax.tree.unflatten(structure, weights)
        axis, rows = model.sequence_axis, jnp.arange(len(state.done))
        before = state.done

        def going(carry: tuple[jax.Array, State]) -> jax.Array:
            return (carry[0] < steps) & (carry[1].done == before).all()

        def body(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
            step, s = carry
            logits, cache = model.decode(jnp.expand_dims(s.last, axis), s.cache)
            token, finite, ended = token_of(jnp.take(logits, 0, axis=axis), s.keys, s.i, knobs, s.seen)
            token = jnp.where(s.done, s.last, token)
            out = s.out.at[rows, jnp.where(s.done, s.out.shape[1], s.i)].set(token, mode="drop")
            i = s.i + ~s.done
            done = s.done | ended | (i >= s.n)
            seen = None if s.seen is None else s.seen.at[rows, token].set(True)
            return step + 1, State(i, s.n, token, out, done, s.finite & (finite | s.done).all(), s.keys, seen, cache)

        return jax.lax.while_loop(going, body, (jnp.int32(0), state))[1]

    return Compiled(
        jax.jit(read),
        jax.jit(place, donate_argnames="state"),
        jax.jit(proceed, donate_argnames="state", compiler_options=loop_options()),
    )


class Result(NamedTuple):
    """Tokens of one prompt that were written since its last result; `ended` with the last of them."""

    prompt: int
    tokens: np.ndarray  # int32
    ended: bool


class Continuous:
    """Continuations of prompts of any lengths, in `rows` rows of one cache.

    prompts: ids int [S] each. n: new tokens of each. key, numbers: prompt k draws its token i with
    fold_in(fold_in(key, numbers[k]), i); default 0, 1, …. A prompt ends with a stop token, which is its last, or after
    n tokens. Prompts with the largest n come first. The cache begins with room for the first prompts, and grows in
    powers of two. Prompts that were read and wait for a row take no more slots than the rows.

    Raises ValueError if the model lacks a member of `LanguageModel` or does not store its cache by position, if an
    argument is out of range, or if a prompt and its new tokens exceed the model's tables.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[np.ndarray],
        n: Sequence[int],
        sampling: Sampling,
        *,
        rows: int,
        stop_tokens: Sequence[int] = (),
        n_tokens: int | None = None,
        key: jax.Array | None = None,
        numbers: Sequence[int] | None = None,
    ):
        check_continuous(model)
        self.model = model.unstacked() if hasattr(model, "unstacked") else model
        self.prompts, self.n = list(prompts), [integer("max_new_tokens", one) for one in n]
        stops = tuple(integer("stop_tokens: id", token, 0) for token in stop_tokens)
        self.weights, structure = jax.tree.flatten(self.model)
        n_vocab = drawn_from(self.model, n_tokens)
        check_vocabulary(n_vocab, np.concatenate([np.asarray(one) for one in self.prompts])[:, None], None, stops)
        self.knobs = sampling.knobs(n_vocab)
        self.compiled = compiled(structure, Fixed(n_vocab, sampling.top_k, stops))
        key = jax.random.key(0) if key is None else key
        ordered = np.arange(len(self.prompts)) if numbers is None else np.asarray(numbers)
        self.keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(ordered, jnp.uint32))
        self.rows = min(integer("rows", rows), len(self.prompts))
        needed = [len(prompt) + more for prompt, more in zip(self.prompts, self.n, strict=True)]
        self.total = admitted(self.model, self.rows, max(needed))
        # The longest continuations first: the rows then end at about the same time.
        self.order = sorted(range(len(self.prompts)), key=lambda k: -self.n[k])
        first = max(len(self.prompts[k]) for k in self.order[: self.rows])
        cache = self.model.init_cache(
            self.rows, min(self.total, capacity(first + 1)), start=jnp.zeros(self.rows, jnp.int32)
        )
        seen = None if self.knobs.penalty is None else jnp.zeros((self.rows, n_vocab), bool)
        self.state = State(  # different arrays, as all of them are donated
            i=jnp.zeros(self.rows, jnp.int32),
            n=jnp.zeros(self.rows, jnp.int32),
            last=jnp.zeros(self.rows, jnp.int32),
            out=jnp.zeros((self.rows, max(self.n)), jnp.int32),
            done=jnp.ones(self.rows, bool),
            finite=jnp.asarray(True),
            keys=jnp.repeat(self.keys[:1], self.rows),
            seen=seen,
            cache=cache,
        )
        self.held: list[int | None] = [None] * self.rows  # prompt of each row
        self.returned = [0] * self.rows  # tokens of each row
        self.groups: dict[int, list[int]] = {}  # the prompts that each of the next prompts is read with
        self.waiting: dict[int, tuple[Group, int]] = {}  # the group of prompts that were read, and their place in it

    def results(self, chunk: int | None = None) -> Iterator[Result]:
        """Iterate over the tokens of prompts as they are written: all of a prompt's, or at least every `chunk` tokens.

        Raises ValueError if there was nothing to draw from.
        """
        following = collections.deque(self.order)
        while following or any(prompt is not None for prompt in self.held):
            for row in range(self.rows):
                if self.held[row] is None and following:
                    if following[0] not in self.groups:
                        self.divide(following)
                    self.admit(row, following.popleft())
            self.fetch()
            steps = min(self.left(row) for row in range(self.rows) if self.held[row] is not None)
            steps = steps if chunk is None else min(steps, chunk)
            if steps > 0:
                self.state = self.compiled.proceed(self.weights, self.state, jnp.int32(steps), self.knobs)
            yield from self.collected(chunk is not None)

    def left(self, row: int) -> int:
        """Tokens that a row can write before it ends or the cache must grow, which it does here if there is none."""
        prompt = self.held[row]
        assert prompt is not None
        i = int(self.counts[row])
        if self.ended[row]:
            return 0
        slots = len(self.prompts[prompt]) + i  # that the next token needs
        if slots > self.room():
            self.grow(slots)
        return int(min(self.n[prompt] - i, self.room() - slots + 1))

    def room(self) -> float:
        cache = self.state.cache
        return float("inf") if cache.is_ring else cache.max_len

    def grow(self, slots: int) -> None:
        self.state = self.state._replace(cache=self.state.cache.grown(min(capacity(slots), self.total)))

    def padded(self, prompt: int) -> int:
        return min(padded_length(len(self.prompts[prompt])), self.total)

    def group_size(self, length: int) -> int:
        """Number of prompts of a padded length that are read together."""
        return max(1, min(self.rows, GROUPED // length))

    def divide(self, following: Iterable[int]) -> None:
        """Divide the next prompts, as many as may wait for rows, into groups of similar lengths."""
        window: list[int] = []
        slots, own = 0, self.state.cache.max_len
        for prompt in following:
            slots += min(self.padded(prompt), own)  # a ring has no more
            if window and slots > self.rows * own:
                break
            window.append(prompt)
        window.sort(key=self.padded, reverse=True)
        while window:
            size = self.group_size(self.padded(window[0]))
            self.groups |= dict.fromkeys(window[:size], window[:size])
            window = window[size:]

    def admit(self, row: int, prompt: int) -> None:
        """Copy a prompt to a row, read with its group if it was not read already."""
        if prompt not in self.waiting:
            self.read(self.groups[prompt])
        del self.groups[prompt]
        group, k = self.waiting.pop(prompt)
        numbers = (jnp.int32(number) for number in (k, row, len(self.prompts[prompt]), self.n[prompt]))
        self.state = self.compiled.place(self.state, group, *numbers, self.keys[prompt])
        self.held[row], self.returned[row] = prompt, 0

    def read(self, prompts: Sequence[int]) -> None:
        """Read the prompts of a group; one of less than its size is filled up, so that few sizes are compiled."""
        length = self.padded(prompts[0])
        if length > self.room():
            self.grow(length)
        filled = [*prompts, *[prompts[-1]] * (self.group_size(length) - len(prompts))]
        ids = [np.asarray(self.prompts[prompt], np.int32) for prompt in filled]
        start = np.asarray([length - len(one) for one in ids], np.int32)
        padded = np.stack([np.pad(one, (length - len(one), 0)) for one in ids])
        keys = self.keys[np.asarray(filled)]
        group = self.compiled.read(self.weights, jnp.asarray(padded), jnp.asarray(start), keys, self.knobs)
        self.waiting |= {prompt: (group, k) for k, prompt in enumerate(prompts)}

    def fetch(self) -> None:
        """Copy the counts and ends of all rows to the host."""
        self.counts, self.ended = np.asarray(self.state.i), np.asarray(self.state.done)

    def collected(self, partly: bool) -> Iterator[Result]:
        """New tokens of the rows that have ended, which become free; `partly`: and of the others."""
        self.fetch()
        if not self.state.finite:
            raise ValueError(NOT_FINITE)
        out = np.asarray(self.state.out) if partly or self.ended.any() else None
        for row, prompt in enumerate(self.held):
            if prompt is None or out is None or not (partly or self.ended[row]):
                continue
            tokens, ended = out[row, self.returned[row] : self.counts[row]].copy(), bool(self.ended[row])
            self.returned[row] = int(self.counts[row])
            if ended:
                self.held[row] = None
            yield Result(prompt, tokens, ended)

    def stop(self, prompt: int) -> None:
        """End a prompt, which makes room for the next one."""
        if prompt in self.held:
            row = self.held.index(prompt)
            self.state = self.state._replace(done=self.state.done.at[row].set(True))
            self.held[row] = None


def supports(model: Any) -> bool:
    """True if a model's rows can be replaced one by one: its cache is by position; see `jaxmodels.protocols`."""
    return bool(getattr(model, "cache_by_position", False))


def check_continuous(model: Any) -> None:
    """Raises ValueError if a model cannot decode, or does not store keys and values by position."""
    check_decoding(model)
    if not supports(model):
        raise ValueError(
            f"model is a {type(model).__name__} without cache_by_position=True: its cache may not be stored by "
            "position, which replacing a row needs; use generate, which continues prompts in fixed batches"
        )
