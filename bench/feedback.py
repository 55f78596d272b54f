"""`python -m bench.feedback`: the Feedback Transformer with shared keys and values against PyTorch.

In one run, in turn: the Flax model, whose recurrence is one scan with a backward pass of its own, and the original's
stack design in PyTorch. For each size: times and their ratio, XLA's temporaries, the share of the limit that matrix
products of these shapes alone set, and how time and temporaries grow with the number of steps. Last, how long a train
step takes to compile.
"""

import argparse
import math
import os
import statistics
import time


def size(text: str) -> tuple[int, int]:
    d_model, steps = map(int, text.split("x"))
    return d_model, steps


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(prog="python -m bench.feedback", description=__doc__)
    arguments.add_argument("--rounds", type=int, default=3, help="timed calls of each (default 3)")
    arguments.add_argument("--threads", type=int, default=1, help="CPU threads for both frameworks (default 1)")
    arguments.add_argument(
        "--sizes",
        type=size,
        nargs="+",
        default=[(128, 128), (128, 512), (256, 256), (256, 512)],
        metavar="DxT",
        help="features and steps (default 128x128 128x512 256x256 256x512)",
    )
    arguments.add_argument("--layers", type=int, default=4)
    arguments.add_argument("--batch", type=int, default=16)
    arguments.add_argument("--heads", type=int, default=8)
    return arguments.parse_args()


def main() -> None:
    options = parse()
    # XLA sizes its thread pool by the processors it may use, once, when it starts.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])

    import torch

    from bench.timing import alternate, report, stamp

    torch.set_num_threads(options.threads)
    print(stamp(options.threads))
    measured: dict[int, list[tuple[int, float, float]]] = {}
    for d_model, steps in options.sizes:
        arguments = (d_model, options.heads, 4 * d_model, options.layers)
        shape = (steps, options.batch, d_model)
        flax, temporaries = flax_gradient(arguments, shape)
        limit = products(arguments, shape)
        functions = {"Flax": flax, "PyTorch, stack": torch_gradient(arguments, shape), "matrix products alone": limit}
        seconds = alternate(functions, options.rounds)
        title = f"Forward and backward: d {d_model}, T {steps}, batch {options.batch}, L {options.layers}, float32"
        report(title, seconds, against="Flax")
        share = statistics.median(seconds["matrix products alone"]) / statistics.median(seconds["Flax"])
        print(f"temporaries {temporaries / 1e6:.0f} MB; {share:.0%} of the limit of the matrix products\n")
        measured.setdefault(d_model, []).append((steps, statistics.median(seconds["Flax"]), temporaries))
    for d_model, rows in measured.items():
        (t0, s0, m0), (t1, s1, m1) = min(rows), max(rows)
        if t1 > t0:
            time_exponent, memory_exponent = (math.log(b / a) / math.log(t1 / t0) for a, b in ((s0, s1), (m0, m1)))
            growth = f"time grows as T^{time_exponent:.2f}, temporaries as T^{memory_exponent:.2f}"
            print(f"d {d_model}, T {t0} to {t1}: {growth}")
    d_model, steps = options.sizes[0]
    seconds = compile_time((d_model, options.heads, 4 * d_model, options.layers), (steps, options.batch))
    print(f"a train step (d {d_model}, T {steps}) traces and compiles in {seconds:.1f} s")


def flax_gradient(arguments, shape):
    """The Flax model's gradients of everything, compiled, as a call; and its temporaries in bytes."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxmodels.feedback import FeedbackTransformerKV

    model = FeedbackTransformerKV(*arguments, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), shape)
    gradient = jax.jit(jax.grad(lambda model, x: jnp.square(model(x)).sum(), (0, 1))).lower(model, x).compile()
    return lambda: jax.block_until_ready(gradient(model, x)), gradient.memory_analysis().temp_size_in_bytes


def torch_gradient(arguments, shape):
    """The same of the original's design in PyTorch."""
    import torch

    from torch_ref.feedback_stack import FeedbackTransformerKV

    model = FeedbackTransformerKV(*arguments)
    x = torch.randn(shape, requires_grad=True)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None
        model(x).square().sum().backward()

    return run


def products(arguments, shape):
    """The products with the layers' weights that no recurrent form avoids: per step B rows, forwards and backwards."""
    import jax
    import jax.numpy as jnp

    d_model, _, d_ff, n_layers = arguments
    sizes = [(d_model, d_model), (d_model, d_model), (d_model, d_ff), (d_ff, d_model)] * n_layers
    kernels = [jax.random.normal(jax.random.key(i), size) / size[0] ** 0.5 for i, size in enumerate(sizes)]

    def step(carry, x):
        for kernel in kernels:
            x = jnp.tanh(x @ kernel)  # something between, or XLA would multiply the kernels with each other
        for kernel in reversed(kernels):
            x = jnp.tanh(x @ kernel.T)
        return carry, x

    @jax.jit
    def weight_gradients(a, b):
        return [a[:, :rows].T @ b[:, :columns] for rows, columns in sizes[:4]]

    run = jax.jit(lambda x: jax.lax.scan(step, 0, x)[1])
    x = jax.random.normal(jax.random.key(0), shape)
    a, b = jax.random.normal(jax.random.key(1), (2, shape[0] * shape[1], d_ff))
    return lambda: jax.block_until_ready((run(x), [weight_gradients(a, b) for _ in range(n_layers)]))


def compile_time(arguments, shape) -> float:
    """Seconds to trace and compile a training step: forward, cross-entropy, backward, Adam."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from jaxmodels.feedback import AutoregressiveModel, FeedbackTransformerKV

    def make():
        return AutoregressiveModel(65, FeedbackTransformerKV(*arguments, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))

    tx = optax.adam(1e-4)

    def step(model, state, ids, labels):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(ids), labels).mean()

        value, gradients = jax.value_and_grad(loss)(model)
        updates, state = tx.update(gradients, state, model)
        return optax.apply_updates(model, updates), state, value

    model = nnx.eval_shape(make)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    state = jax.eval_shape(tx.init, model)
    began = time.perf_counter()
    jax.jit(step, donate_argnums=(0, 1)).lower(model, state, ids, ids).compile()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
