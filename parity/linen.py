"""Linen modules as NNX ones, so that everything else knows one kind."""

import jax.numpy as jnp
from flax import linen, nnx

from parity.objective import Inputs, matches


def as_nnx(module: linen.Module, inputs: Inputs, channels_last: tuple[str, ...] = ()) -> nnx.Module:
    """An abstract NNX module that calls a Linen one; its variables are under the names that Linen gives them.

    The module is called as it is, with the inputs alone: what an evaluation needs (train=False, deterministic=True) has
    to be its default, or one of its fields.
    """

    def make() -> nnx.Module:
        values = {n: jnp.moveaxis(v, 1, -1) if matches(n, channels_last) else v for n, v in inputs.named().items()}
        model = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0))
        inputs.call(lambda *args, **kwargs: nnx.bridge.lazy_init(model, *args, **kwargs), values)
        model.to_nnx__rngs = None  # drawn once; a call needs none
        return model

    return nnx.eval_shape(make)
