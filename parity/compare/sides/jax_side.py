"""The JAX side: a Flax module run and differentiated at a chosen precision, on a chosen device."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from parity.compare.inputs import Inputs, cast
from parity.compare.loss import Batch, Kinds, jax_loss
from parity.compare.names import matches
from parity.compare.noise import RUNS, Noise, Spread, moved, of_spreads
from parity.compare.outputs import aligned, others_in, returned_leaves
from parity.compare.sides.widen import Constant, Widened
from parity.compare.weights import Weights

Arrays = dict[str, jax.Array]


@contextlib.contextmanager
def strict_precision(float64: bool, device: jax.Device) -> Iterator[None]:
    """Run the block with full float32 matmuls (no TF32 or bfloat16), on one device, with float64 on or off."""
    with jax.enable_x64(float64), jax.default_matmul_precision("highest"), jax.default_device(device):
        yield


@contextlib.contextmanager
def default_precision(precision: str | None, device: jax.Device) -> Iterator[None]:
    """Run the block with float32 matmuls at a named precision (None: the device's default), on one device."""
    with jax.enable_x64(False), jax.default_matmul_precision(precision), jax.default_device(device):
        yield


CPU_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_cpu_parallel_codegen_split_count": 32,  # the default: results round alike whatever XLA_FLAGS says
}


def compiled(function: Callable[..., Any], donated: tuple[int, ...] = ()) -> Callable[..., Any]:
    """`jax.jit`; on a CPU with `cpu_options`, which change no operation.

    donated: arguments whose memory the results may take.
    """
    options = cpu_options() if current_device().platform == "cpu" else None
    return jax.jit(function, compiler_options=options, donate_argnums=donated)


@functools.cache
def cpu_options() -> dict[str, Any]:
    """Options of XLA's compiler for CPUs, without those that this version of XLA does not have.

    Without LLVM's optimizer and without the emitters of fused loops, each of which doubles the compile time; and with
    operations in the order that needs the least memory, not in one that runs many of them at a time.
    """
    found: dict[str, Any] = {}
    for option, value in CPU_OPTIONS.items():
        try:
            jax.jit(lambda: 0, compiler_options={option: value}).lower().compile()
        except jax.errors.JaxRuntimeError:
            continue
        found[option] = value
    return found


def current_device() -> jax.Device:
    """The device set by `jax.default_device`, or JAX's first device."""
    config: Any = jax.config  # its type does not list the settings
    return config.jax_default_device or jax.devices()[0]


def as_in_torch(gradients: Any) -> Any:
    """JAX's gradients as PyTorch defines them: that of a complex array is the conjugate. Others are not copied."""
    return jax.tree.map(lambda a: jnp.conj(a) if jnp.iscomplexobj(a) else a, gradients)


def differentiable(_: Any, variable: Any) -> bool:
    """True for parameters of floats; integers, as those of quantized layers, have no gradient."""
    dtype = getattr(variable, "dtype", None)
    return isinstance(variable, nnx.Param) and dtype is not None and bool(jnp.issubdtype(dtype, jnp.inexact))


def split(module: Any) -> tuple[Any, nnx.State, nnx.State]:
    """A module's structure, its parameters and its other variables, for nnx.merge."""
    graphdef, *states = nnx.split(module, differentiable, ...)
    params, rest = states
    return graphdef, params, rest


def with_caches(rest: nnx.State, dtype: Any) -> nnx.State:
    """Variables with the floating caches in a dtype: a call writes activations of that dtype into them."""
    caches, others = nnx.split_state(rest, nnx.Cache, ...)
    return nnx.merge_state(others, jax.tree.map(lambda array: cast(array, dtype), caches))


class JaxSide:
    """A Flax module with its weights in one dtype. Its tensors have PyTorch's names.

    In float64 it runs with nothing narrowed (`widen`); in other dtypes it runs as it is. inputs: define which arguments
    of a call are positional and which are keywords. channels_last: patterns of inputs and outputs that have their
    channels last here and second in PyTorch.
    """

    def __init__(self, module: Any, weights: Weights, inputs: Inputs, dtype: Any, channels_last: Sequence[str] = ()):
        self.module, self.weights, self.inputs = module, weights, inputs
        self.dtype, self.channels_last = jnp.dtype(dtype), tuple(channels_last)
        self.others: list[str] = []  # what the last call returned beside its arrays, once it was traced
        self.graphdef, self.params, rest = split(module)
        self.rest = with_caches(rest, self.dtype)
        self.value_and_grad = self.prepared(jax.value_and_grad(self._objective, argnums=(0, 1), has_aux=True))
        self.forward = self.prepared(self._outputs)

    def prepared(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function compiled; in float64 with nothing narrowed inside."""
        return Widened(function, compiled) if self.dtype == np.float64 else compiled(function)

    def call(self, module: Callable[..., Any], values: Mapping[str, Any]) -> Arrays:
        """Call this module, or another with the same arguments; returns outputs by name in PyTorch's layout."""
        values = {n: jnp.moveaxis(v, 1, -1) if matches(n, self.channels_last) else v for n, v in values.items()}
        called = self.inputs.call(module, values, side="flax", dtype=self.dtype)
        self.others = others_in(called, jax.Array)
        outputs = returned_leaves(called, jax.Array, "Flax")
        return {n: jnp.moveaxis(v, -1, 1) if matches(n, self.channels_last) else v for n, v in outputs.items()}

    def loaded(self, state_dict: Mapping[str, Any]) -> "JaxSide":
        """The same module with other weights; nothing is recompiled."""
        side = copy.copy(self)
        side.module = self.weights.load(self.module, state_dict)
        _, side.params, rest = split(side.module)
        side.rest = with_caches(rest, side.dtype)
        return side

    def merged(self, params: nnx.State, rest: nnx.State | None = None) -> Any:
        """The module with other parameters; it has copies of all variables, which its call may change."""
        return nnx.merge(self.graphdef, params, self.rest if rest is None else rest, copy=True)

    def _objective(
        self, params: nnx.State, floats: Arrays, others: Arrays, labels: Any, targets: Arrays, rest: nnx.State
    ) -> tuple[jax.Array, Arrays]:
        outputs = self.call(self.merged(params, rest), floats | others)
        return jax_loss(aligned(outputs, targets, self.channels_last), labels, targets), outputs

    def _outputs(self, params: nnx.State, values: Arrays, rest: nnx.State) -> Arrays:
        return self.call(self.merged(params, rest), values)

    def values(self, inputs: Inputs) -> tuple[Arrays, Arrays]:
        """The floating inputs, in this side's dtype, and the others."""
        arrays = {name: jnp.asarray(value) for name, value in inputs.named().items()}
        floats = {n: cast(a, self.dtype) for n, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.inexact)}
        return floats, {name: array for name, array in arrays.items() if name not in floats}

    def arguments(self, batch: Batch) -> tuple[Arrays, Arrays, Any, Arrays]:
        """Arguments of `value_and_grad` after the parameters: floating inputs, other inputs, labels, targets."""
        targets = {name: cast(jnp.asarray(target), self.dtype) for name, target in batch.targets.items()}
        return *self.values(batch.inputs), batch.labels, targets

    def evaluate(self, batch: Batch, *, gradients: bool = True) -> Kinds:
        """Outputs, and the loss's gradients of parameters and inputs if asked for."""
        if not gradients:
            return {"output": self.outputs(batch.inputs)}
        results = self.value_and_grad(self.params, *self.arguments(batch), self.rest)
        return self.kinds(*results)

    def kinds(self, value: tuple[jax.Array, Arrays], gradients: tuple[nnx.State, Arrays]) -> Kinds:
        """Results of `value_and_grad` by kind and PyTorch's name."""
        (_, outputs), (of_params, of_inputs) = value, gradients
        kinds = {
            "output": {name: np.asarray(output) for name, output in outputs.items()},
            "parameter gradients": self.weights.read(as_in_torch(of_params), gradients=True),
            "input gradients": {name: np.conj(gradient) for name, gradient in of_inputs.items()},
        }
        return {kind: tensors for kind, tensors in kinds.items() if tensors}

    def outputs(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """The outputs alone."""
        floats, others = self.values(inputs)
        return {n: np.asarray(output) for n, output in self.forward(self.params, floats | others, self.rest).items()}

    def noises(self, batch: Batch, truth: Kinds, ulp: float, seed: int) -> dict[str, dict[str, Noise]]:
        """The rounding noise of this side's own results, where PyTorch's is not known."""
        spreads = {kind: {name: Spread(tensor) for name, tensor in tensors.items()} for kind, tensors in truth.items()}
        rng, side = np.random.default_rng(seed), copy.copy(self)
        for _ in range(RUNS):
            side.params = jax.tree.map(lambda a: jnp.asarray(moved(np.asarray(a), ulp, rng), a.dtype), self.params)
            found = side.evaluate(batch.with_inputs(batch.inputs.moved(ulp, rng)))
            for kind, of_kind in spreads.items():
                for name, spread in of_kind.items():
                    spread.add(found[kind][name], truth[kind][name])
        return {kind: of_spreads(of_kind, ulp) for kind, of_kind in spreads.items()}

    @property
    def constants(self) -> list[Constant]:
        """The constants that the port holds in a narrow float, known once it has been evaluated in float64."""
        return next((one.constants for one in self.evaluations if one.last is not None), [])

    @property
    def evaluations(self) -> list[Widened]:
        """The functions that `evaluate` calls in float64."""
        return [one for one in (self.value_and_grad, self.forward) if isinstance(one, Widened)]

    @property
    def casts(self) -> dict[str, int]:
        """Casts that the last evaluation widened, by place."""
        return next((one.casts for one in self.evaluations if one.last is not None), {})

    @property
    def kept(self) -> list[str]:
        """Primitives that the last evaluation could not widen."""
        return next((one.kept for one in self.evaluations if one.last is not None), [])

    def with_moved_constants(
        self, batch: Batch, rng: np.random.Generator, only: int | None = None, *, gradients: bool = True
    ) -> Kinds:
        """`evaluate` in float64 with the constants that the port holds in a narrow float moved by one rounding."""
        assert isinstance(self.value_and_grad, Widened), "only float64 is widened"
        assert isinstance(self.forward, Widened), "only float64 is widened"
        floats, others, labels, targets = self.arguments(batch)
        if not gradients:
            outputs = self.forward.moved(rng, self.params, floats | others, self.rest, only=only)
            return {"output": {name: np.asarray(output) for name, output in outputs.items()}}
        arguments = (self.params, floats, others, labels, targets, self.rest)
        return self.kinds(*self.value_and_grad.moved(rng, *arguments, only=only))
