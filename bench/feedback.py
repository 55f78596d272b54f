"""`python -m bench.feedback`: the Feedback Transformer with shared keys and values, compared with PyTorch.

Alternates in one run between the Flax model, whose recurrence is one scan with a custom backward pass, and the
original's stack design in PyTorch. For each size, forward and backward: times and their ratio, XLA's temporaries, and
the share of the Flax time that the unavoidable matrix products take. Then the growth of time and temporaries with the
number of steps, beyond the 512 of the comparison with the stack; decoding; and the time to compile a training step.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from bench.device import add_device, compiled, synchronize, torch_device, use


class Size(NamedTuple):
    """Sizes of a measurement; `d_model x steps x layers x batch` on the command line."""

    d_model: int
    steps: int
    layers: int = 4
    batch: int = 16
    heads: int = 8

    @classmethod
    def of(cls, text: str) -> "Size":
        return cls(*map(int, text.split("x")))

    @property
    def arguments(self) -> tuple[int, int, int, int]:
        return self.d_model, self.heads, 4 * self.d_model, self.layers

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.steps, self.batch, self.d_model

    def __str__(self) -> str:
        return f"d {self.d_model}, T {self.steps}, L {self.layers}, batch {self.batch}"


SIZES = [Size(d_model, steps) for d_model in (128, 256) for steps in (64, 128, 256, 512)]
ORIGINAL = Size(512, 128, layers=6, batch=64)


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(prog="python -m bench.feedback", description=__doc__)
    arguments.add_argument("--rounds", type=int, default=3, help="timed calls of each (default 3)")
    add_device(arguments, threads=1)
    arguments.add_argument(
        "--sizes",
        type=Size.of,
        nargs="+",
        default=[*SIZES, ORIGINAL],
        metavar="DxT",
        help="features x steps [x layers x batch]; default: 128 and 256 by 64 to 512, and the original's 512x128x6x64",
    )
    arguments.add_argument(
        "--growth",
        type=int,
        default=2048,
        metavar="T",
        help="longest text of the growth part (default 2048; 0: skip it)",
    )
    arguments.add_argument("--tokens", type=int, default=512, help="tokens to decode (default 512; 0: skip decoding)")
    return arguments.parse_args()


def main() -> None:
    options = parse()
    use(options.device, options.threads)

    from bench.timing import stamp

    console = Console(width=120, highlight=False)
    console.print(stamp(options.threads, options.device))
    gradients(options)
    if options.growth:
        for d_model in (128, 256):
            console.print(growth(d_model, options))
    if options.tokens:
        console.print(decoding(options))
    size = options.sizes[-1]
    console.print(f"a training step ({size}) traces and compiles in {compile_time(size):.1f} s")


def gradients(options: argparse.Namespace) -> None:
    """Forward and backward: print one row per size, when it has been measured."""
    from bench.timing import alternate

    headings = f"{'Flax ms':>10}{'stack ms':>11}{'÷ Flax':>9}{'temporaries MB':>17}{'of the products’ limit':>25}"
    print(f"\nForward and backward, float32\n{'size':34}{headings}", end="")
    print(f"{'compiled ÷ Flax':>18}" if options.device == "gpu" else "", flush=True)
    for size in options.sizes:
        flax, temporaries = flax_gradient(size)
        functions = {"flax": flax, "stack": torch_gradient(size, options.device), "limit": products(size)}
        if options.device == "gpu":
            functions["compiled"] = torch_gradient(size, options.device, compile=True)
        seconds = alternate(functions, options.rounds)
        median = {name: statistics.median(times) for name, times in seconds.items()}
        ratio = {
            name: statistics.median(a / b for a, b in zip(times, seconds["flax"], strict=True))
            for name, times in seconds.items()
        }
        row = f"{size!s:34}{1e3 * median['flax']:>10.1f}{1e3 * median['stack']:>11.1f}{ratio['stack']:>9.2f}"
        row += f"{temporaries / 1e6:>17.0f}{ratio['limit']:>25.0%}"
        print(row + (f"{ratio['compiled']:>18.2f}" if "compiled" in ratio else ""), flush=True)
    print()


def flax_gradient(size: Size) -> tuple[Callable[[], object], int]:
    """Compiled gradients of the Flax model with respect to parameters and input, and their temporaries in bytes."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxmodels.feedback import FeedbackTransformerKV

    model = FeedbackTransformerKV(*size.arguments, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), size.shape)
    gradient = jax.jit(jax.grad(lambda model, x: jnp.square(model(x)).sum(), (0, 1))).lower(model, x).compile()
    memory = gradient.memory_analysis()
    assert memory is not None, "CPU and GPU backends report it"
    return lambda: jax.block_until_ready(gradient(model, x)), memory.temp_size_in_bytes


def torch_gradient(size: Size, device: str, compile: bool = False) -> Callable[[], None]:
    """Gradients of the original's stack design in PyTorch."""
    import torch

    from torch_ref.feedback_stack import FeedbackTransformerKV

    where = torch_device(device)
    model = FeedbackTransformerKV(*size.arguments).to(where)
    x = torch.randn(size.shape, device=where, requires_grad=True)
    call = compiled(model) if compile else model

    def run() -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None
        call(x).square().sum().backward()
        synchronize(device)

    return run


def products(size: Size) -> Callable[[], object]:
    """Products with the layers' weights that every recurrent form needs: B rows per step, forward and backward."""
    import jax
    import jax.numpy as jnp

    d_model, _, d_ff, n_layers = size.arguments
    sizes = [(d_model, d_model), (d_model, d_model), (d_model, d_ff), (d_ff, d_model)] * n_layers
    kernels = [jax.random.normal(jax.random.key(i), shape) / shape[0] ** 0.5 for i, shape in enumerate(sizes)]

    def step(carry: int, x: jax.Array) -> tuple[int, jax.Array]:  # features first, which is faster on CPUs
        for kernel in kernels:
            x = jnp.tanh(jax.lax.optimization_barrier(kernel.T) @ x)  # keeps XLA from multiplying kernels together
        for kernel in reversed(kernels):
            x = jnp.tanh(kernel @ x)
        return carry, x

    @jax.jit
    def weight_gradients(a: jax.Array, b: jax.Array) -> list[jax.Array]:
        return [a[:, :rows].T @ b[:, :columns] for rows, columns in sizes[:4]]

    run = jax.jit(lambda x: jax.lax.scan(step, 0, x)[1])
    x = jax.random.normal(jax.random.key(0), size.shape).swapaxes(1, 2)
    a, b = jax.random.normal(jax.random.key(1), (2, size.steps * size.batch, d_ff))
    return lambda: jax.block_until_ready((run(x), [weight_gradients(a, b) for _ in range(n_layers)]))


def growth(d_model: int, options: argparse.Namespace) -> str:
    """Time and temporaries at a quarter, half and all of the longest text, and the growth exponents between them."""
    from bench.timing import alternate

    sizes = [Size(d_model, options.growth // part) for part in (4, 2, 1)]
    calls = {str(size): flax_gradient(size) for size in sizes}
    seconds = alternate({size: call for size, (call, _) in calls.items()}, options.rounds)
    lines, shorter = [f"d {d_model}"], None
    for size in sizes:
        cost = statistics.median(seconds[str(size)]), calls[str(size)][1]
        line = f"  T {size.steps:4}: {cost[0]:6.2f} s, temporaries {cost[1] / 1e6:4.0f} MB"
        if shorter is not None:
            of_time, of_memory = (math.log2(b / a) for a, b in zip(shorter, cost, strict=True))
            line += f"; as T^{of_time:.2f} and T^{of_memory:.2f}"
        lines.append(line)
        shorter = cost
    return "\n".join(lines)


def decoding(options: argparse.Namespace) -> Table:
    """Greedy decoding, token by token, from an empty text."""
    from bench.timing import alternate

    n, n_vocab = options.tokens, 65
    table = Table(title=f"Decoding {n} tokens, float32", title_justify="left")
    for heading in ("size", "Flax ms per token", "PyTorch ms per token", "÷ Flax"):
        table.add_column(heading, justify="right" if heading != "size" else "left")
    for size in (Size(128, n, batch=1), Size(256, n, batch=1), Size(128, n), Size(256, n)):
        functions = {
            "flax": flax_decoding(size, n_vocab, n),
            "torch": torch_decoding(size, n_vocab, n, options.device),
        }
        seconds = alternate(functions, options.rounds)
        ratio = statistics.median(a / b for a, b in zip(seconds["torch"], seconds["flax"], strict=True))
        per_token = [f"{1e3 * statistics.median(times) / n:.3f}" for times in seconds.values()]
        table.add_row(str(size), *per_token, f"{ratio:.1f}")
    return table


def flax_decoding(size: Size, n_vocab: int, n: int) -> Callable[[], object]:
    """Decoding by `jaxmodels.generate`."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxmodels.feedback import AutoregressiveModel, FeedbackTransformerKV
    from jaxmodels.generate import generate

    transformer = FeedbackTransformerKV(*size.arguments, rngs=nnx.Rngs(0))
    model = AutoregressiveModel(n_vocab, transformer, rngs=nnx.Rngs(1))
    prompt = jnp.zeros((1, size.batch), jnp.int32)
    return lambda: jax.block_until_ready(generate(model, prompt, n))


def torch_decoding(size: Size, n_vocab: int, n: int, device: str) -> Callable[[], None]:
    """Eager PyTorch with preallocated buffers for n memories; each token reads the filled part."""
    import torch

    from torch_ref.feedback import AutoregressiveModel, FeedbackTransformerKV

    where = torch_device(device)
    transformer = FeedbackTransformerKV(*size.arguments)
    model = AutoregressiveModel(n_vocab, transformer).to(where).eval()
    shape = n, size.batch, size.heads, size.d_model // size.heads

    @torch.no_grad()
    def run() -> None:
        keys, values = torch.empty(shape, device=where), torch.empty(shape, device=where)
        token = torch.zeros(size.batch, dtype=torch.long, device=where)
        for t in range(n):
            seen = (keys[:t], values[:t]) if t else (None, None)
            x, memory = transformer.step(model.src_embed(token), *seen)
            keys[t], values[t] = transformer.key(memory), transformer.value(memory)
            token = model.generator(transformer.norm(x)).argmax(dim=-1)
        synchronize(device)

    return run


def compile_time(size: Size) -> float:
    """Seconds to trace and compile a training step: forward, cross-entropy, backward, Adam."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from jaxmodels.feedback import AutoregressiveModel, FeedbackTransformerKV

    def make() -> AutoregressiveModel:
        return AutoregressiveModel(65, FeedbackTransformerKV(*size.arguments, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))

    tx = optax.adam(1e-4)

    def step(model: Any, state: Any, ids: jax.Array, labels: jax.Array) -> tuple[Any, Any, jax.Array]:
        def loss(model: Any) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(ids), labels).mean()

        value, gradients = jax.value_and_grad(loss)(model)
        updates, state = tx.update(gradients, state, model)
        return optax.apply_updates(model, updates), state, value

    model = nnx.eval_shape(make)
    ids = jax.ShapeDtypeStruct(size.shape[:2], jnp.int32)
    state = jax.eval_shape(tx.init, model)
    began = time.perf_counter()
    jax.jit(step, donate_argnums=(0, 1)).lower(model, state, ids, ids).compile()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
