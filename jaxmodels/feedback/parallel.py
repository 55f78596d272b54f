"""Initialization of a Feedback Transformer from a trained parallel transformer (arXiv 2002.09402, section 4.2).

Axes: P rows of a table, H heads, D = d_model.
"""

import warnings
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxmodels.feedback.attention import FeedbackAttention
from jaxmodels.feedback.model import AutoregressiveModel
from jaxmodels.transformer import AutoregressiveTransformer
from jaxmodels.weights.names import flat_arrays, with_arrays
from jaxmodels.weights.stored import shapes_of

TABLES = ("key_pos_embeddings", "key_pos_bias")


class ApproximateWarning(UserWarning):
    """Warning that weights were combined because they could not be copied."""


def from_parallel(
    model: AutoregressiveTransformer, variant: str = "FeedbackTransformer", *, memory: int | None = None
) -> AutoregressiveModel:
    """Feedback model with the weights of an `AutoregressiveTransformer(attention='relative')`, for further training.

    Weights are copied; of the position tables [2P, H, …], the first P rows. Only the mixture of layers is new. For
    'FeedbackTransformerKV' the shared key and value are means over the layers, which emits an ApproximateWarning. The
    shared value has no bias: each layer's value bias is multiplied by the output kernel and added to the output bias,
    which is exact. Raises ValueError for another attention or variant, and for a model whose sub-modules were replaced.
    """
    if not isinstance(model, AutoregressiveTransformer) or model.attention != "relative":
        kind = f"{type(model).__name__}, attention={getattr(model, 'attention', None)!r}"
        raise ValueError(f"model is {kind}; it must be an AutoregressiveTransformer with attention='relative'")
    names = ("d_model", "heads", "d_ff", "n_layers", "dropout_prob")
    sizes: dict[str, Any] = {name: getattr(model, name) for name in names} | {"memory": memory}
    target = shapes_of(lambda rngs: AutoregressiveModel.from_config(model.n_vocab, variant, **sizes, rngs=rngs))
    check_kinds(model, shapes_of(lambda rngs: type(model)(**model.config(), rngs=rngs)))
    arrays = {renamed(path): array for path, array in flat_arrays(model).items()}
    arrays = {path: array[: FeedbackAttention.P] if path[-1] in TABLES else array for path, array in arrays.items()}
    # Copies, so that either model may be donated.
    arrays = {path: jnp.array(array, copy=True) for path, array in arrays.items()}
    arrays[("transformer", "weights")] = jnp.ones(model.n_layers + 1, model.src_embed.embedding.dtype)
    if variant == "FeedbackTransformerKV":
        arrays = share_keys_and_values(arrays, model.n_layers)
        warnings.warn(
            "the shared key and value are means of the parallel model's layers, an approximation",
            ApproximateWarning,
            stacklevel=2,
        )
    assert arrays.keys() == flat_arrays(target).keys(), "the two models' parts have the same names"
    return with_arrays(target, arrays)


def check_kinds(model: nnx.Module, made: nnx.Module) -> None:
    """Raises ValueError, naming the sub-module, if one is of another class than in the model that was made anew."""
    kinds = {path: type(module) for path, module in nnx.iter_modules(made)}
    for path, module in nnx.iter_modules(model):
        if path in kinds and type(module) is not kinds[path]:
            name = ".".join(map(str, path))
            raise ValueError(f"{name} is a {type(module).__name__}; it must be a {kinds[path].__name__}")


def renamed(path: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Path in the feedback model of an array of the parallel model."""
    words = {"encoder": "transformer", "self_attn": "attn"}
    return tuple(words.get(word, word) if isinstance(word, str) else word for word in path if word != "projection")


def share_keys_and_values(arrays: dict[Any, Any], n_layers: int) -> dict[Any, Any]:
    """Replace each layer's key and value by one shared key and value."""
    arrays = dict(arrays)

    def of_layers(*name: str) -> list[Any]:
        return [arrays.pop(("transformer", "layers", i, "attn", *name)) for i in range(n_layers)]

    for name in ("key", "value"):
        arrays["transformer", name, "linear", "kernel"] = jnp.stack(of_layers(name, "linear", "kernel")).mean(axis=0)
    for i, bias in enumerate(of_layers("value", "linear", "bias")):
        output = ("transformer", "layers", i, "attn", "output")
        arrays[*output, "bias"] += bias @ arrays[*output, "kernel"]
    return arrays
