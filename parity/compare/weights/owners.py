"""Parts of a Flax model by path: its modules, and which of its arrays are trained."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from jaxmodels.weights.names import Path

WORDS = {  # of Flax, Haiku and penzai
    "weight": ("kernel", "embedding", "scale", "w", "weights", "embeddings"),
    "bias": ("b", "offset"),
    "running_mean": ("mean",),
    "running_var": ("var",),
}
# A weight under weight_norm or spectral_norm, as a parametrization and by the older functions.
NORMED = {
    "parametrizations.weight.original0": ("weight_g",),
    "parametrizations.weight.original1": ("weight_v", "kernel"),
    "parametrizations.weight.original": ("weight_orig", "kernel"),
    "parametrizations.weight.0._u": ("weight_u",),
    "parametrizations.weight.0._v": ("weight_v",),
    "weight_v": ("kernel",),
    "weight_orig": ("kernel",),
}


def place(lookup: Mapping[str, Path], name: str) -> tuple[Path, int | None] | None:
    """Look up a name, also with Flax's word for the array or as one layer of a stack: (path, layer)."""
    options = [name]
    for ending, words in (NORMED | WORDS).items():
        if name == ending or name.endswith(f".{ending}"):
            options += [name.removesuffix(ending) + word for word in words]
    for option in options:
        if option in lookup:
            return lookup[option], None
    for option in options:
        parts = option.split(".")
        for i, word in enumerate(parts):
            if word.isdigit():
                stacked = ".".join(parts[:i] + parts[i + 1 :])
                if stacked in lookup:
                    return lookup[stacked], int(word)
    return None


def normed_words(key: str) -> tuple[str, ...]:
    """The names that a weight under a parametrization has elsewhere."""
    _, word, ending = key.rpartition("parametrizations.")
    return NORMED.get(word + ending, ())


def owner_of(model: Any, path: Path) -> Any:
    """The module that holds the array at a path, NNX or Linen; None if it is unknown."""
    recorded = vars(model).get("to_nnx__parts")
    if recorded is not None:
        return recorded.modules.get(path[:-1])
    node: Any = model
    for word in path[:-1]:
        try:
            node = node[word] if hasattr(node, "__getitem__") else getattr(node, str(word))
        except (AttributeError, KeyError, IndexError, TypeError):
            return None
    return node if isinstance(node, nnx.Module) else None


def parameters(model: Any) -> set[Path]:
    """Paths of the arrays that are parameters, which are trained."""
    flat: Any = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {path for path, _ in flat}


def kind(dtype: Any) -> str:
    """Floating, complex or integer, the kinds that no conversion may change."""
    import jax.numpy as jnp

    if jnp.issubdtype(dtype, jnp.complexfloating):
        return "complex"
    return "floating" if jnp.issubdtype(dtype, jnp.floating) else "integer"
