"""Small NeoX models in every form that the configuration allows."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.neox import NeoX, NeoXConfig
from tests.common import B, S, V, filled, token_ids

CONFIG = NeoXConfig(V, 3 * 10, 2, 3, rope_percentage=0.4, n_ff=17)
FORMS = {
    "parallel": {},
    "sequential": {"parallel_residual": False},
    "tanh": {"activation": "gelu_tanh"},
    "tied": {"tied": True},
    "variant": {"norm": "rmsnorm", "n_kv_heads": 1, "attention_bias": False, "ffn_bias": False},
    "other": {"rope_percentage": 1.0, "rope_base": 300.0, "layer_norm_eps": 0.1, "n_ff": None},
}
START = jnp.asarray([0, 3, 11, 1, 12])  # of S = 13 tokens, in B = 5 rows


def neox(stacked: bool = True, **fields) -> NeoX:
    """The model with every array drawn at random."""
    config = dataclasses.replace(CONFIG, **fields)
    model = filled(lambda: NeoX(config, rngs=nnx.Rngs(0)), scale=0.3)
    return model if stacked else model.unstacked()


def ids(seed: int = 0) -> jax.Array:
    return token_ids(seed, B, S)
