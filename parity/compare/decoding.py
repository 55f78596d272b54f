"""Decoding through a cache, for any language model that has the methods of `jaxmodels.protocols.LanguageModel`.

The first input of such a model's call is the token ids. Its other inputs reach decoding in one of two ways:

    an input that `init_cache` takes under the same name, such as `start`, is passed to `init_cache`
    all others are passed to the model's `decoding_inputs` (`ReadsMoreThanIds`), which cuts them into the arguments of
    `prefill` and of every `decode`; a model with other inputs but without this method is not decoded
"""

import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.protocols import LanguageModel, ReadsMoreThanIds
from parity.compare.inputs import Inputs
from parity.compare.sides.jax_side import compiled


class NotDecodable(Exception):
    """Raised if a model cannot be decoded with the inputs; the message is the reason."""


def decodes(module: Any) -> bool:
    """True if a module has the methods of `LanguageModel`."""
    return isinstance(module, LanguageModel)


def decoded(model: Any, inputs: Inputs, dtype: Any) -> tuple[int, np.ndarray]:
    """Logits through the cache, laid out like the ids, from position `first` on: (first, logits).

    The text is read by a prefill, a chunk of five tokens, single tokens, and a chunk again. Raises NotDecodable if
    the model does not define how an input reaches decoding.
    """
    ids, others = ids_and_others(model, inputs)
    axis = model.sequence_axis
    model = model.unstacked() if hasattr(model, "unstacked") else model  # as `jaxmodels.generate` decodes
    n = ids.shape[axis]
    prompt = max(1, n - 17)
    cuts = [c for c in (0, prompt, *range(prompt + 5, prompt + 13)) if c < n] + [n]
    of_cache, of_calls = arguments(model, others, cuts)
    pieces = [jnp.asarray(ids.take(range(a, b), axis)) for a, b in itertools.pairwise(cuts)]
    # New functions at every call: jit caches by function, and a check must run the current code.
    prefill = compiled(lambda model, ids, cache, more: model.prefill(ids, cache, **more))
    decode = compiled(lambda model, ids, cache, more: model.decode(ids, cache, **more))
    cache = model.init_cache(ids.shape[1 - axis], n, dtype, **of_cache)
    last, cache = prefill(model, pieces[0], cache, of_calls[0])
    logits = [jnp.expand_dims(last, axis)]
    for piece, more in zip(pieces[1:], of_calls[1:], strict=True):
        further, cache = decode(model, piece, cache, more)
        logits.append(further)
    return prompt - 1, np.asarray(jnp.concatenate(logits, axis=axis))


def ids_and_others(model: Any, inputs: Inputs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The token ids, and the other inputs by the names of the call's parameters."""
    parameters = list(inspect.signature(model).parameters)
    places: dict[str, Any] = {f"input {i}": i for i in range(len(inputs.args))} | inputs.places.get("flax", {})
    called = {name: parameters[place] if isinstance(place, int) else place for name, place in places.items()}
    (_, ids), *others = inputs.named().items()
    return ids, {called.get(name, name): value for name, value in others}


def arguments(
    model: Any, others: Mapping[str, np.ndarray], cuts: Sequence[int]
) -> tuple[dict[str, Any], list[dict[str, jax.Array]]]:
    """Keyword arguments of `init_cache`, and of `prefill` and each `decode`; see the module's docstring."""
    known = inspect.signature(model.init_cache).parameters
    of_cache: dict[str, Any] = {name: value for name, value in others.items() if name in known}
    rest = {name: jnp.asarray(value) for name, value in others.items() if name not in known}
    if not rest:
        return of_cache, [{} for _ in cuts[1:]]
    if not isinstance(model, ReadsMoreThanIds):
        raise NotDecodable(f"{type(model).__name__} has no decoding_inputs for {', '.join(rest)}")
    more, of_calls = model.decoding_inputs(rest, cuts)
    return of_cache | more, [dict(call) for call in of_calls]
