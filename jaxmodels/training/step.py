"""Training step and evaluation as pure functions over arrays, for one device or a mesh.

Axes: B batch, S sequence, V vocabulary. A batch is a dict of arrays whose first axis is B; "tokens" is int [B, S + 1].
If it has "predicted", bool [B, S], the other targets are padding: they are in no loss, and models do not see the array.
Losses are in nats per token.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmodels import native
from jaxmodels.attention_kernels import Kernel, attention_kernel
from jaxmodels.cross_entropy import Read, chunks, mean_nats, token_nats
from jaxmodels.layers import PRODUCT, Fixed, Frozen, hooks
from jaxmodels.protocols import has_divided_readout
from jaxmodels.sharding import (
    BATCH,
    DividedVocabulary,
    activation_placement,
    batch_sharding,
    divided_lookup,
    parameter_specs,
)
from jaxmodels.weights.names import dotted, flat_arrays, with_arrays

PREDICTED = "predicted"
Arrays = dict[str, jax.Array]
Batch = Mapping[str, Any]
Losses = Callable[[Any, Batch, jax.Array | None], jax.Array]
Precision = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "layers"]

policies = jax.checkpoint_policies
PRODUCTS = policies.save_from_both_policies(
    policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(PRODUCT)
)
REMAT: dict[Remat, Callable[[Callable], Callable] | None] = {
    "none": None,
    "dots": lambda f: jax.checkpoint(f, policy=PRODUCTS),
    "layers": jax.checkpoint,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Training state. Arrays of the model are keyed by dotted path: encoder.layers.0.norm_ff.scale."""

    step: jax.Array  # int32: number of updates so far
    key: jax.Array  # for dropout; the step is folded in
    params: Arrays  # updated by the optimizer
    fixed: Arrays  # the model's other arrays
    optimizer: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metrics:
    """Device-side metrics of a step."""

    loss: jax.Array  # mean over all tokens
    squares: jax.Array  # squared norm of each gradient before clipping, in the order of the sorted paths
    stop: jax.Array  # True if any process was signaled to stop


def token_losses(model: Any, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
    """Cross-entropy of each next token: {"tokens": int [B, S + 1]} -> nats [B, S], in float32 or wider.

    Other arrays of the batch are passed to the model's call under their names. If the model's readout is divided from
    the rest (`DividedReadout`), the logits are computed in chunks; see `jaxmodels.cross_entropy`.
    """
    nats = token_nats(*readout(model, batch, rng), model.sequence_axis)
    return nats.T if model.sequence_axis == 0 else nats


def mean_loss(model: Any, batch: Batch, rng: jax.Array | None = None, weights: jax.Array | None = None) -> jax.Array:
    """Mean of `token_losses`, or sum with weights [B, S]; its gradient takes one product with the readout less."""
    if weights is not None and model.sequence_axis == 0:
        weights = weights.T
    return mean_nats(*readout(model, batch, rng), model.sequence_axis, weights)


def readout(model: Any, batch: Batch, rng: jax.Array | None) -> tuple[Read, jax.Array, jax.Array]:
    """Function to logits, its argument [B, S, D] or [S, B, D], and targets: the model's readout, or the identity."""
    inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]  # [B, S]
    if model.sequence_axis == 0:
        inputs, targets = inputs.T, targets.T  # [S, B]
    others = {name: array for name, array in batch.items() if name != "tokens"} | ({} if rng is None else {"rng": rng})
    if has_divided_readout(model):
        return model.read, model.features(inputs, **others), targets
    return lambda logits: logits, model(inputs, **others), targets


@dataclasses.dataclass(frozen=True)
class Numerics:
    """Numerical settings of a step: accumulation, dtypes, rematerialization, chunks of the cross-entropy, attention."""

    accumulate: int = 1
    compute_dtype: Precision = "float32"
    param_dtype: Precision = "float32"
    remat: Remat = "none"
    loss_chunk: int | None = None
    attention_kernel: Kernel = "auto"


class Program:
    """A model and an optimizer as functions over arrays, placed on a mesh.

    make_model: builds the initialized model; it is traced. losses(model, batch, rng) -> nats [B, S]. trains(path):
    selects the Params that the optimizer updates; the others keep the dtype in which make_model returns them, as do
    `Frozen` arrays. Raises ValueError if the mesh does not fit the model.
    """

    def __init__(
        self,
        make_model: Callable[[], Any],
        transformation: optax.GradientTransformation,
        mesh: Mesh,
        numerics: Numerics = Numerics(),
        *,
        losses: Losses = token_losses,
        trains: Callable[[str], bool] = lambda path: True,
        dropout: bool = False,
    ):
        self.make_model, self.transformation, self.mesh, self.numerics = make_model, transformation, mesh, numerics
        self.losses, self.dropout = losses, dropout
        self.accept: Callable[[jax.stages.Compiled], None] = lambda compiled: None
        self.abstract = nnx.eval_shape(make_model)
        variables: dict[Any, Any] = dict(nnx.to_flat_state(nnx.state(self.abstract)))
        self.paths = {dotted(path): path for path in variables}
        self.trained = {
            name for name, path in self.paths.items() if isinstance(variables[path], nnx.Param) and trains(name)
        }
        self.kinds = {name: type(variables[path]) for name, path in self.paths.items()}
        shapes = {name: variables[path].get_value().shape for name, path in self.paths.items()}
        self.specs = parameter_specs(self.abstract, shapes, mesh)

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(array.size for array in self.abstract_state().params.values())

    @property
    def all_parameters(self) -> int:
        """Number of parameters, including those that are not trained; without tables and buffers."""
        state = self.abstract_state()
        frozen = (array.size for name, array in state.fixed.items() if not issubclass(self.kinds[name], Fixed))
        return self.parameters + sum(frozen)

    def init(self, seed: jax.Array) -> State:
        """Build the state before the first step; a pure function."""
        arrays = {dotted(path): array for path, array in flat_arrays(self.make_model()).items()}
        params, fixed = self.split(self.stored(arrays))
        step, key, optimizer = self.init_rest(params, seed)
        return State(step, key, params, fixed, optimizer)

    def stored(self, arrays: Arrays) -> Arrays:
        """Cast a model's arrays to the dtypes of a state: all but frozen weights to param_dtype."""
        frozen = {
            name: array
            for name, array in arrays.items()
            if issubclass(self.kinds[name], nnx.Param | Frozen) and name not in self.trained
        }
        return cast(arrays, self.numerics.param_dtype) | frozen

    def split(self, arrays: Arrays) -> tuple[Arrays, Arrays]:
        """Split a model's arrays into those that the optimizer updates and the rest."""
        params = {name: arrays[name] for name in sorted(self.trained)}
        return params, {name: array for name, array in arrays.items() if name not in self.trained}

    def init_rest(self, params: Arrays, seed: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        """Step number, random key and optimizer state before the first step."""
        return jnp.zeros((), jnp.int32), jax.random.key(seed), self.transformation.init(params)

    def state_of(self, model: Any, seed: int = 0) -> State:
        """Build the state before the first step from a model's arrays; raises ValueError if its sizes differ."""
        arrays = {dotted(path): array for path, array in flat_arrays(model).items()}
        own = {dotted(path): array.shape for path, array in flat_arrays(self.abstract).items()}
        given = {name: array.shape for name, array in arrays.items()}
        different = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
        if different:
            name = different[0]
            raise ValueError(
                f"the given model must have this run's sizes: {name} is {given.get(name, 'missing')} in it and "
                f"{own.get(name, 'missing')} here"
            )
        arrays = {
            name: put(array, NamedSharding(self.mesh, self.specs[name])) for name, array in self.stored(arrays).items()
        }
        params, fixed = self.split(arrays)
        places = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        init_rest = jax.jit(self.init_rest, out_shardings=(places.step, places.key, places.optimizer))
        step, key, optimizer = init_rest(params, np.uint32(seed))
        return State(step, key, params, fixed, optimizer)

    def abstract_state(self) -> State:
        """Shapes, dtypes and shardings of the state."""
        shapes = jax.eval_shape(self.init, jax.ShapeDtypeStruct((), jnp.uint32))

        arrays = shapes.params | shapes.fixed

        def placed(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            # Optimizer moments are in dicts by the names of their parameters, and are placed like them.
            name = next((key for key in (getattr(part, "key", "") for part in reversed(path)) if key in arrays), None)
            spec = PartitionSpec()
            if name is not None:
                rows = getattr(path[-1], "name", "") == "v_row"
                spec = moment_spec(self.specs[name], arrays[name].shape, leaf.shape, rows)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(self.mesh, spec))

        return jax.tree_util.tree_map_with_path(placed, shapes)

    def make_state(self, seed: int) -> State:
        """Build the state before the first step, each shard on its own device."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        return jax.jit(self.init, out_shardings=shardings)(np.uint32(seed))

    def model(self, state: State, dtype: Precision | None = None) -> Any:
        """Build the model with the arrays of a state, cast to dtype if given, except those of kind `Frozen`."""
        arrays = {**state.params, **state.fixed}
        if dtype is not None:
            arrays |= cast({name: a for name, a in arrays.items() if not issubclass(self.kinds[name], Frozen)}, dtype)
        return with_arrays(self.abstract, {self.paths[name]: array for name, array in arrays.items()})

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Trace models with the numerical settings, and with activations constrained to the mesh."""
        several = self.mesh.size > 1
        placement = activation_placement(self.mesh) if several else None
        lookup = divided_lookup(self.mesh) if several else None
        vocabulary = DividedVocabulary(self.mesh) if several else None
        platform = self.mesh.devices.flat[0].platform
        cpu = platform == "cpu" and not several
        product = native.large_product if cpu else None
        with (
            hooks(placement=placement, remat=REMAT[self.numerics.remat], lookup=lookup, product=product, cpu=cpu),
            chunks(self.numerics.loss_chunk, platform, self.mesh.size, vocabulary=vocabulary),
            attention_kernel(self.numerics.attention_kernel, self.mesh),
        ):
            yield

    def check_kernel(self, batch: Batch) -> None:
        """Raise ValueError if the attention kernel 'fused' is set and does not apply to the step, which is traced."""
        if self.numerics.attention_kernel == "fused":
            with self.tracing():
                jax.eval_shape(lambda *arguments: self.gradients(*arguments), self.abstract_state(), batch)

    def gradients(self, state: State, batch: Batch) -> tuple[jax.Array, Arrays]:
        """Mean loss and its gradient over a batch, computed in `accumulate` parts one after the other."""
        rng = jax.random.fold_in(state.key, state.step) if self.dropout else None
        n = self.numerics.accumulate
        shares = batch.get(PREDICTED)
        if shares is not None:  # each part's loss is its share of the whole batch's mean
            shares = n * shares / shares.sum()
            batch = {**batch, PREDICTED: shares}

        def loss(params: Arrays, part: Batch, rng: jax.Array | None) -> jax.Array:
            model = self.model(dataclasses.replace(state, params=params), self.numerics.compute_dtype)
            inputs, weights = without_mask(part), part.get(PREDICTED)
            if self.losses is token_losses:
                return mean_loss(model, inputs, rng, weights)
            losses = self.losses(model, inputs, rng)
            return losses.mean() if weights is None else (losses * weights).sum()

        if n == 1:
            return jax.value_and_grad(loss)(state.params, batch, rng)

        def add(carry: Any, part_and_number: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            part, number = part_and_number
            part_rng = None if rng is None else jax.random.fold_in(rng, number)
            part = jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, batch_sharding(self.mesh)), part)
            return jax.tree.map(jnp.add, carry, jax.value_and_grad(loss)(state.params, part, part_rng)), None

        # A part is every n-th row, so that each device already holds its rows of it: [B, ...] -> [n, B / n, ...]
        parts = jax.tree.map(lambda a: a.reshape(-1, n, *a.shape[1:]).swapaxes(0, 1), dict(batch))
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(loss, state.params, take(parts, 0), rng))
        sums, _ = jax.lax.scan(add, (zeros, jax.tree.map(jnp.zeros_like, state.params)), (parts, jnp.arange(n)))
        return jax.tree.map(lambda a: a / n, sums)

    def step(self, state: State, batch: Batch, stop: jax.Array) -> tuple[State, Metrics]:
        """Take one step; a pure function. stop: bool [devices], the flag of each device's process."""
        loss, gradients = self.gradients(state, batch)
        squares = jnp.stack([jnp.sum(jnp.square(g.astype(loss.dtype))) for _, g in sorted(gradients.items())])
        updates, optimizer = self.transformation.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        state = dataclasses.replace(state, step=state.step + 1, params=params, optimizer=optimizer)
        return state, Metrics(loss, squares, stop.any())

    @property
    def state_bytes(self) -> int:
        """Bytes of a state, over all devices."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.abstract_state()))

    def compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        """Compile a step or evaluation; raises what `accept` raises, before anything is computed."""
        compiled = lowered.compile()
        self.accept(compiled)
        return compiled

    def lower_step(self, batch: Batch, length: int | None = None) -> jax.stages.Lowered:
        """Trace the step for batches of these shapes, which may be abstract. The step donates the state.

        length: compute with this many leading tokens of each sequence; default all.
        """

        def step(state: State, batch: Batch, stop: jax.Array) -> tuple[State, Metrics]:
            return self.step(state, shortened(batch, length), stop)

        state, stop = self.abstract_state(), self.abstract_stop()
        replicated = NamedSharding(self.mesh, PartitionSpec())
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        with self.tracing():
            # A new function each time: jit would reuse a trace made under other hooks.
            jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated))
            return jitted.lower(state, self.abstract_batch(batch), stop)

    def lower_evaluation(self, batch: Batch) -> jax.stages.Lowered:
        """Trace the sum of each row's losses, without dropout: (State without optimizer, batch) -> nats [B]."""

        def sums(state: State, batch: Batch) -> jax.Array:
            losses = self.losses(self.model(state, self.numerics.compute_dtype), without_mask(batch), None)
            predicted = batch.get(PREDICTED)
            return (losses if predicted is None else losses * predicted).sum(axis=1)

        with self.tracing():
            rows = jax.jit(sums, out_shardings=NamedSharding(self.mesh, PartitionSpec()))
            return rows.lower(without_optimizer(self.abstract_state()), self.abstract_batch(batch))

    def abstract_batch(self, batch: Batch) -> Batch:
        sharding = batch_sharding(self.mesh)
        return {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for name, a in batch.items()}

    def abstract_stop(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.mesh.size,), bool, sharding=stop_sharding(self.mesh))


def moment_spec(spec: PartitionSpec, of: tuple[int, ...], shape: tuple[int, ...], rows: bool) -> PartitionSpec:
    """PartitionSpec of an optimizer's array for a parameter of shape `of`: as the parameter's on the axes they share.

    An array with one of the last two axes averaged, of Adafactor, is divided along the others. rows: of a square
    matrix, the last axis was averaged, not the one before. Any other shape is replicated.
    """
    if shape == of:
        return spec
    entries = (*spec, *(None,) * (len(of) - len(spec)))
    for axis in (-1, -2) if rows else (-2, -1):
        kept = [i for i in range(len(of)) if i != len(of) + axis]
        if len(of) > 1 and shape == tuple(of[i] for i in kept):
            return PartitionSpec(*(entries[i] for i in kept))
    return PartitionSpec()


def without_optimizer(state: State) -> State:
    return dataclasses.replace(state, optimizer=None)


def stop_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec((*BATCH, "tensor")))


def shortened(batch: Batch, length: int | None) -> Batch:
    """Keep the first `length` tokens of each sequence, and the one predicted from them."""
    if length is None:
        return batch
    cut = {name: batch[name][:, :stop] for name, stop in (("tokens", length + 1), (PREDICTED, length)) if name in batch}
    return {**batch, **cut}


def without_mask(batch: Batch) -> Batch:
    """Arrays of a batch that a model is called with."""
    return {name: array for name, array in batch.items() if name != PREDICTED}


def take(parts: Batch, i: int) -> Batch:
    return jax.tree.map(lambda a: a[i], parts)


def put(array: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    """Place an array on a mesh. An array that every process holds becomes one global array."""
    if array.is_fully_addressable and not sharding.is_fully_addressable:
        return jax.make_array_from_callback(array.shape, sharding, np.asarray(array).__getitem__)
    return jax.device_put(array, sharding)


def cast(arrays: Arrays, dtype: Precision) -> Arrays:
    """Cast floating-point arrays, except float64, which only tests of the mathematics use."""
    return {
        name: array.astype(dtype) if array.dtype in (jnp.float32, jnp.bfloat16, jnp.float16) else array
        for name, array in arrays.items()
    }
