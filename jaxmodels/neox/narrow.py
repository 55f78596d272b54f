"""NeoX with the weights of its products left in 16 bits and float32 arithmetic, for inference on a CPU.

A cast of the whole model to float32 gives the same numbers, but for the order of sums; it takes twice the memory, and a
decoded token, which reads every weight once, twice the time.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels import native
from jaxmodels.layers import Embed, Frozen, rows_of
from jaxmodels.neox.block import Linear
from jaxmodels.neox.int8 import LINEARS, with_linears
from jaxmodels.weights.precision import WIDE


class NarrowLinear(nnx.Module):
    """y = xW + b in float32, with W in 16 bits, as stored.

    weight: W transposed, float16 or bfloat16 [O, I]: an output's weights are contiguous, and read at once. bias:
    float32 [O].
    """

    def __init__(self, linear: nnx.Linear):
        self.weight = Frozen(linear.kernel[...].swapaxes(-1, -2))
        self.bias = linear.bias

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., I] -> float32 [..., O]."""
        y = native.product(x.astype(jnp.float32), self.weight[...])  # [..., O]
        return y if self.bias is None else y + self.bias[...]


class NarrowEmbed(nnx.Module):
    """Embedding table [V, D] in 16 bits, as stored; rows and logits are float32."""

    def __init__(self, embed: nnx.Embed):
        self.embedding = Frozen(embed.embedding[...])

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids [...] -> float32 [..., D]; NaN for ids outside the table."""
        return rows_of(self.embedding[...], ids).astype(jnp.float32)

    def attend(self, query: jax.Array) -> jax.Array:
        """Tied readout: query [..., D] -> float32 logits [..., V]."""
        return native.product(query.astype(jnp.float32), self.embedding[...])


def narrowed(model: Any, listed: nnx.List) -> Any:
    """Copy of a NeoX for which `can_narrow` is true, with these layers: see `NeoX.narrowed`.

    Linear maps become `NarrowLinear`, the embedding `NarrowEmbed`; other arrays are cast to float32.
    """
    small = model.with_layers(nnx.List(with_linears(block, NarrowLinear) for block in listed))
    small.embedding.emb = NarrowEmbed(small.embedding.emb)
    if not model.settings.tied:
        small.readout.linear = NarrowLinear(small.readout.linear)
    small.settings = dataclasses.replace(model.settings, dtype=WIDE)

    def cast(variable: Any) -> Any:
        return variable if isinstance(variable, Frozen) else jax.tree.map(lambda array: array.astype(WIDE), variable)

    return jax.tree.map(cast, small, is_leaf=lambda part: isinstance(part, nnx.Variable))


def can_narrow(model: Any) -> bool:
    """True for a NeoX without a 16-bit compute dtype whose linear maps and embedding are plain, in one 16-bit dtype."""
    blocks = [model.layers] if model.is_stacked else list(model.layers)
    linears: list[Any] = [
        getattr(getattr(block, owner, None), name, None) for block in blocks for owner, name in LINEARS
    ]
    linears += [] if model.settings.tied else [getattr(model.readout, "linear", None)]
    embed = model.embedding.emb
    if type(embed) is not Embed or any(type(linear) not in (Linear, nnx.Linear) for linear in linears):
        return False
    dtypes = {embed.embedding[...].dtype, *(linear.kernel[...].dtype for linear in linears)}
    return len(dtypes) == 1 and dtypes.pop().name in native.NARROW and model.settings.dtype in (None, WIDE)
