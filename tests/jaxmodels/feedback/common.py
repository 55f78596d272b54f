"""The oracle of the recurrence: the same steps in one naive scan over whole buffers, left to plain autodiff."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.feedback import FeedbackTransformer, FeedbackTransformerKV
from tests.common import filled

VARIANTS = [FeedbackTransformer, FeedbackTransformerKV]
SIZES = {"d_model": 6, "heads": 3, "d_ff": 7, "n_layers": 2}


def transformer(variant, **others):
    return filled(lambda: variant(**SIZES | others, rngs=nnx.Rngs(0)), scale=0.3)


def naive(model, x_seq: jax.Array) -> jax.Array:
    """The paper's equations, one expression per equation: [S, B, D] -> [S, B, D]."""
    n, batch, d = x_seq.shape
    weights = jax.nn.softmax(model.weights[...])

    def step(memory, inputs):
        t, x = inputs
        distance = t - jnp.arange(n)
        visible = (distance > 0) & (distance <= (n if model.memory is None else model.memory))
        mixed = weights[0] * x
        for layer, w in zip(model.layers, weights[1:], strict=True):
            attn, shared = layer.attn, model if layer.attn.key is None else layer.attn
            rows = jnp.where(visible, attn.P - distance, 0)
            key, value = shared.key(memory), shared.value(memory)
            q = attn.query(layer.norm_self_attn(x))
            scores = jnp.einsum("bhd,jbhd->jbh", q + attn.query_pos_bias, key)
            scores += jnp.einsum("bhd,jhd->jbh", q, attn.key_pos_embeddings[rows]) + attn.key_pos_bias[rows][:, None]
            scores = jnp.where(visible[:, None, None], scores / jnp.sqrt(attn.d_k), -1e9)
            attended = jnp.einsum("jbh,jbhd->bhd", jax.nn.softmax(scores, axis=0), value).reshape(batch, d)
            x = x + jnp.where(t > 0, attn.output(attended), 0)
            x = x + layer.feed_forward(layer.norm_ff(x))
            mixed = mixed + w * x
        return memory.at[t].set(mixed), x

    _, outputs = jax.lax.scan(step, jnp.zeros_like(x_seq), (jnp.arange(n), x_seq))
    return model.norm(outputs)
