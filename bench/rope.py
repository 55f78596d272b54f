"""`python -m bench.rope`: a training step of the RoPE language model, at the originals' sizes, compared with PyTorch.

Alternates in one run between the Flax model; its PyTorch twin, eager and compiled; and a model with PyTorch's fused
attention, `scaled_dot_product_attention`, eager and compiled. A step is forward, cross-entropy, backward and Adam.
Then times the parts of the Flax step separately and prints their share of the step.
"""

import argparse
import functools
import math
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bench.device import add_device, synchronize, torch_device, use

if TYPE_CHECKING:  # imported by `main` once the processors are set
    import numpy as np
    import torch


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(prog="python -m bench.rope", description=__doc__)
    arguments.add_argument("--rounds", type=int, default=9, help="timed steps of each (default 9)")
    add_device(arguments, threads=2)
    arguments.add_argument("--sequence", type=int, default=512, help="tokens of a sequence (default 512)")
    arguments.add_argument("--batch", type=int, default=4, help="sequences of a step (default 4)")
    arguments.add_argument("--no-compile", action="store_true", help="skip torch.compile, which needs a C++ compiler")
    return arguments.parse_args()


N_VOCAB, D_MODEL, HEADS, D_FF, N_LAYERS = 65, 128, 16, 512, 6  # the originals' experiment


def main() -> None:
    options = parse()
    use(options.device, options.threads)

    import numpy as np

    from bench.timing import alternate, report, stamp, with_limit

    ids = np.random.default_rng(0).integers(0, N_VOCAB, (options.sequence + 1, options.batch))
    step, flops = flax_step(ids)
    steps = {"Flax": step} | torch_steps(ids, options.device, compiled=not options.no_compile)
    print(stamp(options.threads, options.device))
    shape = f"S {options.sequence}, batch {options.batch}, d {D_MODEL}, H {HEADS}, L {N_LAYERS}, float32"
    report(f"Training step: {shape}", with_limit(steps, options.rounds, flops), against="Flax")

    parts = flax_parts(ids)
    seconds = alternate({"whole step": steps["Flax"]} | parts, options.rounds)
    whole = statistics.median(seconds["whole step"])
    print("\nThe Flax step's parts, forward and backward, each alone, as a share of the step:")
    for name in parts:
        median = statistics.median(seconds[name])
        print(f"  {name:32} {1e3 * median:6.0f} ms {median / whole:6.0%}")


def flax_step(ids: "np.ndarray") -> tuple[Callable[[], None], int]:
    """Training step of the Flax model, whose state is carried between calls, and the operations of its products."""
    import jax
    import optax
    from flax import nnx

    from jaxmodels.training.plan.flops import count
    from jaxmodels.transformer import AutoregressiveTransformer

    model = AutoregressiveTransformer(N_VOCAB, D_MODEL, HEADS, D_FF, N_LAYERS, rngs=nnx.Rngs(0))
    tx = optax.adam(1e-4)

    def loss(model: nnx.Module, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(inputs), labels).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(model: nnx.Module, state: Any, inputs: jax.Array, labels: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(model, inputs, labels)
        updates, state = tx.update(gradients, state, model)
        return optax.apply_updates(model, updates), state, value

    inputs, labels = jax.device_put((ids[:-1], ids[1:]))
    flops = 3 * count(loss, model, inputs, labels)  # backward takes twice the forward pass
    carried = [model, tx.init(model)]

    def run() -> None:
        *carried[:], value = step(*carried, inputs, labels)
        value.block_until_ready()

    return run, flops


def flax_parts(ids: "np.ndarray") -> dict[str, Callable[[], object]]:
    """Parts of the step by name, each jitted separately with its gradients, repeated as often as in the model."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from jaxmodels.transformer import AutoregressiveTransformer

    model = AutoregressiveTransformer(N_VOCAB, D_MODEL, HEADS, D_FF, N_LAYERS, rngs=nnx.Rngs(0))
    inputs, labels = jax.device_put((ids[:-1], ids[1:]))
    x = jax.random.normal(jax.random.key(0), (*inputs.shape, D_MODEL))
    tx = optax.adam(1e-4)
    state = tx.init(model)

    def attention(layers: Any, x: jax.Array) -> jax.Array:
        for layer in layers:
            x = x + layer.self_attn(query=x, key=x, value=x, mask="causal")
        return x.sum()

    def feed_forward(layers: Any, x: jax.Array) -> jax.Array:
        for layer in layers:
            x = x + layer.feed_forward(x)
        return x.sum()

    def ends(model: Any, x: jax.Array) -> jax.Array:
        logits = model.generator(model.src_embed(inputs) + x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def norms(layers: Any, x: jax.Array) -> jax.Array:
        for layer in layers:
            x = x + layer.norm_self_attn(x)
            x = x + layer.norm_ff(x)
        return x.sum()

    def differentiated(function: Callable[[Any, jax.Array], jax.Array], *arguments: Any) -> Callable[[], object]:
        both = jax.jit(jax.grad(function, argnums=(0, 1)))
        return lambda: jax.block_until_ready(both(*arguments))

    update = jax.jit(lambda gradients, state, model: tx.update(gradients, state, model))
    gradients = jax.tree.map(jnp.ones_like, model)
    return {
        f"{N_LAYERS} × attention": differentiated(attention, model.encoder.layers, x),
        f"{N_LAYERS} × feed-forward": differentiated(feed_forward, model.encoder.layers, x),
        f"{2 * N_LAYERS} × norm and residual": differentiated(norms, model.encoder.layers, x),
        "embedding, readout, cross-entropy": differentiated(ends, model, x),
        "Adam": lambda: jax.block_until_ready(update(gradients, state, model)),
    }


def torch_steps(ids: "np.ndarray", device: str, *, compiled: bool) -> dict[str, Callable[[], object]]:
    """Training steps of the PyTorch models by name."""
    import torch

    from torch_ref.transformer import AutoregressiveTransformer

    where = torch_device(device)
    inputs, labels = torch.as_tensor(ids[:-1], device=where), torch.as_tensor(ids[1:], device=where)

    def step(module: Any) -> Callable[[], None]:
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-4)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            logits = module(inputs)
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
            optimizer.step()
            synchronize(device)

        return run

    def twin() -> torch.nn.Module:
        return AutoregressiveTransformer(N_VOCAB, D_MODEL, HEADS, D_FF, N_LAYERS).to(where)

    def fused() -> torch.nn.Module:
        return fused_model().to(where)

    steps: dict[str, Callable[[], object]] = {
        "PyTorch twin, eager": step(twin()),
        "PyTorch fused attention, eager": step(fused()),
    }
    if compiled:
        steps["PyTorch twin, compiled"] = step(torch.compile(twin()))
        steps["PyTorch fused attention, compiled"] = step(torch.compile(fused()))
    return steps


def fused_model() -> "torch.nn.Module":
    """The same model with one matmul for q, k and v, and PyTorch's fused attention."""
    import torch
    from torch import nn

    d_k = D_MODEL // HEADS

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(D_MODEL), nn.LayerNorm(D_MODEL)
            self.qkv, self.output = nn.Linear(D_MODEL, 3 * D_MODEL), nn.Linear(D_MODEL, D_MODEL)
            self.ff = nn.Sequential(nn.Linear(D_MODEL, D_FF), nn.ReLU(), nn.Linear(D_FF, D_MODEL))

        def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            def rotate(x: torch.Tensor) -> torch.Tensor:
                x1, x2 = x.chunk(2, dim=-1)
                return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)

            q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, d_k)).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            x = x + self.output(y.transpose(1, 2).flatten(2))
            return x + self.ff(self.norm2(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(N_VOCAB, D_MODEL), nn.LayerNorm(D_MODEL)
            self.layers = nn.ModuleList(Layer() for _ in range(N_LAYERS))
            self.readout = nn.Linear(D_MODEL, N_VOCAB)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            position = torch.arange(len(ids), dtype=torch.float32, device=ids.device)
            frequency = torch.exp(-math.log(10_000) * torch.arange(0, d_k, 2, device=ids.device) / d_k)
            angle = torch.outer(position, frequency)
            cos, sin = angle.cos(), angle.sin()
            x = self.embed(ids.T)
            for layer in self.layers:
                x = layer(x, cos, sin)
            return self.readout(self.norm(x)).transpose(0, 1)

    return Model()


if __name__ == "__main__":
    main()
