#!/usr/bin/env python
"""A language model of one's own, trained on a text.

    python my_experiment.py --text FILE            # the same command resumes a run that was stopped
    python my_experiment.py --help
    jaxmodels evaluate runs/my_experiment --experiment my_experiment
    jaxmodels sample runs/my_experiment --experiment my_experiment
    jaxmodels plan my_experiment --topology v5e:2x4

The model predicts a token from the embeddings of the last few (Bengio et al. 2003): replace it by yours.
"""

if __name__ == "__main__":  # Ctrl-C ends the imports below with one line
    from jaxmodels.process.programs import end_at_ctrl_c

    end_at_ctrl_c("my_experiment")

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxmodels
from jaxmodels.cache import Cache, make_cache
from jaxmodels.training import config
from jaxmodels.training.experiment import Experiment
from jaxmodels.training.script import run_script


@jaxmodels.register("my_experiment.Model")  # checkpoints are saved under this name
class Model(nnx.Module):
    """Axes: B batch, S sequence, C context, D width, V vocabulary."""

    sequence_axis = 1  # calls take tokens [B, S]; 0: [S, B]

    # Required on a mesh with an fsdp or tensor axis only: regular expression of a path -> axes of the mesh.
    sharding_rules = (
        (r"embed\.embedding", P(None, "fsdp")),
        (r"hidden\.kernel", P("fsdp", "tensor")),
        (r"hidden\.bias", P("tensor")),
        (r"out\.kernel", P("tensor", None)),
        (r"out\.bias", P()),
    )

    def __init__(self, n_vocab: int, width: int, hidden: int, context: int, *, rngs: nnx.Rngs):
        self.sizes = {"n_vocab": n_vocab, "width": width, "hidden": hidden, "context": context}
        self.embed = nnx.Embed(n_vocab, width, rngs=rngs)
        self.hidden = nnx.Linear(context * width, hidden, rngs=rngs)
        self.out = nnx.Linear(hidden, n_vocab, rngs=rngs)

    def config(self) -> dict[str, int]:
        """Arguments that build the model again, saved with each checkpoint."""
        return self.sizes

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Logits of the next token at every position: int [B, S] -> [B, S, V]. Needs `rng` too if it has dropout."""
        return self.logits(self.embed(ids), jnp.arange(ids.shape[1]))

    def logits(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        places = positions[:, None] - jnp.arange(self.sizes["context"])  # [S, C]
        seen = jnp.where((places >= 0)[..., None], x[:, jnp.maximum(places, 0)], 0)  # [B, S, C, D]
        return self.out(jnp.tanh(self.hidden(seen.reshape(*seen.shape[:2], -1))))

    # The three below write text. Without them, reports have no sample.

    def init_cache(
        self, batch: int, max_len: int, dtype: jnp.dtype | None = None, start: jax.Array | None = None
    ) -> Cache:
        x = jnp.zeros((batch, 1, max_len, self.sizes["width"]), dtype or self.embed.embedding.dtype)
        return make_cache([{"x": x}], batch, start)

    def prefill(self, ids: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        logits, cache = self.decode(ids, cache)
        return logits[:, -1], cache

    def decode(self, ids: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        n = ids.shape[1]
        new = self.embed(ids)[:, None]  # [B, 1, S, D]
        x = jax.lax.dynamic_update_slice(cache.layers[0]["x"], new, (0, 0, cache.length, 0))
        return self.logits(x[:, 0], cache.positions(n)), cache.advance(({"x": x},), n)


@dataclasses.dataclass(frozen=True)
class Config(config.AdamWConfig):
    """Hyperparameters of a run. Each field is a flag; the text below it is its help."""

    PRESETS = ("small", "large")

    context: int = 8
    """number of tokens that predict the next"""

    def positive(self) -> list[str]:
        return [*super().positive(), "context"]

    @classmethod
    def small(cls) -> "Config":
        """Minutes on one CPU core."""
        return cls(d_model=32, d_ff=256)

    @classmethod
    def large(cls) -> "Config":
        """Hours on an accelerator."""
        return cls(d_model=256, d_ff=8192, context=32, batch_size=256, steps=20_000)


class MyExperiment(Experiment[Config]):
    config_class = Config

    def model(self, n_vocab: int) -> Model:
        c = self.config
        return Model(n_vocab, c.d_model, c.d_ff, c.context, rngs=nnx.Rngs(c.seed))


EXPERIMENT = MyExperiment  # what the commands look for in this module

if __name__ == "__main__":
    run_script(EXPERIMENT)
