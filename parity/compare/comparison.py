"""`Comparison`: a pair of modules and the settings that all readings share, resolved once.

    torch           PyTorch's module, a copy with perturbed constant parameters; a recording of one; or None
    flax            Flax's module as an NNX module (`adapters`); None while PyTorch is recorded
    weights         the conversion of PyTorch's tensors to Flax's arrays (names, layouts, flax_only, torch_only)
    inputs          the arguments of both modules' calls
    channels_last   patterns of inputs and outputs that have another layout in Flax
    labels          targets of a cross-entropy; None: random targets of a squared distance
    zero_gradients  patterns of parameters whose gradients are zero in exact arithmetic; they are not trained
    device, float64 JAX's device, and whether Flax runs in float64 there
    seed            of perturbations and random targets

`Settings` lists the keyword arguments that resolve to these fields; `parity.check` documents them. Every reading
(`parity.measure`, `parity.golden`, `parity.mutation`) takes a Comparison and gets its sides from it.
"""

import contextlib
import copy
import dataclasses
import functools
import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.process.seeds import seed_32
from jaxmodels.weights.names import as_numpy
from parity.checkpoint.opened import is_source, is_stored
from parity.compare.arguments import checked_labels, fitted, is_torch, modules
from parity.compare.inputs import Inputs, cast
from parity.compare.loss import Batch, Kinds, random_targets
from parity.compare.names import Names, matches
from parity.compare.noise import check_counted
from parity.compare.outputs import correspondence
from parity.compare.sides import jax_side
from parity.compare.sides.adapters import as_module, returned
from parity.compare.sides.dtypes import computing_in
from parity.compare.sides.jax_side import JaxSide
from parity.compare.weights import Mapped, OwnWeights, TorchModule, Twins, Weights, weights_of
from parity.compare.weights.resolve import difference, resolved
from parity.compare.weights.twins import Kept, kept_or

if TYPE_CHECKING:
    from parity.compare.sides.torch_side import TorchSide


class Settings(TypedDict, total=False):
    """Keyword arguments of `parity.check` that every reading takes; see there."""

    labels: Any
    names: Names | Weights | None
    layouts: Mapping[str, str] | None
    torch_only: Sequence[str]
    flax_only: Sequence[str]
    torch_kwargs: Mapping[str, Any] | None
    flax_kwargs: Mapping[str, Any] | None
    channels_last: Sequence[str]
    zero_gradients: Sequence[str]
    device: str | None
    float64: bool | None
    randomize: bool
    seed: int


@dataclasses.dataclass(frozen=True)
class Sides:
    """Both sides in one dtype, and the reference: PyTorch in float64, its weights and inputs rounded to that dtype."""

    inputs: Inputs
    reference: "TorchSide"
    torch: "TorchSide"
    jax: JaxSide


class Cast(Mapping[str, np.ndarray]):
    """A state_dict with its floating tensors in another dtype, each cast when it is asked for."""

    def __init__(self, state_dict: Mapping[str, Any], dtype: str):
        self.state_dict, self.dtype = state_dict, jnp.dtype(dtype)

    def __getitem__(self, name: str) -> np.ndarray:
        return cast(as_numpy(self.state_dict[name]), self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.state_dict)

    def __len__(self) -> int:
        return len(self.state_dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two modules to compare; the fields are documented above. `Comparison.of` resolves a user's arguments."""

    torch: TorchModule | None
    flax: Any
    weights: Weights
    inputs: Inputs
    labels: np.ndarray | None
    channels_last: tuple[str, ...]
    zero_gradients: tuple[str, ...]
    device: jax.Device
    float64: bool
    seed: int

    @classmethod
    def of(
        cls,
        torch_module: Any,
        flax_module: Any,
        inputs: Any,
        *,
        labels: Any = None,
        names: Names | Weights | None = None,
        layouts: Mapping[str, str] | None = None,
        torch_only: Sequence[str] = (),
        flax_only: Sequence[str] = (),
        torch_kwargs: Mapping[str, Any] | None = None,
        flax_kwargs: Mapping[str, Any] | None = None,
        channels_last: Sequence[str] = (),
        zero_gradients: Sequence[str] = (),
        device: str | None = None,
        float64: bool | None = None,
        randomize: bool = True,
        seed: int = 0,
    ) -> "Comparison":
        """Resolve the arguments of `parity.check`, which documents them.

        Either module may be a checkpoint (`parity.checkpoint.opened`): PyTorch's is loaded into the twin of the Flax
        model, a Flax folder keeps its own weights. Without a PyTorch module the Flax module keeps its own weights;
        without a Flax module PyTorch runs alone. Raises ValueError for a negative seed and for inputs or modules of
        another kind, ConversionError if the weights do not fit, and RuntimeError if JAX has no such device.
        """
        seed = seed_32(seed)
        labels = checked_labels(labels)
        notes: tuple[str, ...] = ()
        if is_source(torch_module) or is_stored(flax_module):
            from parity.checkpoint.pair import opened_pair

            torch_module, flax_module, kept, notes = opened_pair(torch_module, flax_module)
            names = kept_or(names, kept)
        torch_module, flax_module = modules(torch_module, flax_module)
        inputs = fitted(Inputs.of(inputs, torch_kwargs, flax_kwargs), torch_module, flax_module)
        inputs = dataclasses.replace(inputs, notes=(*notes, *inputs.notes))
        chosen = jax.devices(device)[0]
        float64 = chosen.platform != "tpu" if float64 is None else float64
        if flax_module is not None:
            flax_module = as_module(flax_module, inputs, channels_last)
        weights: Weights
        if torch_module is None:
            weights = OwnWeights(jnp.float64 if float64 else jnp.float32)
        else:
            settings = (names, layouts, flax_only, torch_only)
            weights = Twins() if flax_module is None else weights_of(torch_module, flax_module, *settings)
            if randomize and is_torch(torch_module) and not isinstance(weights, Kept):
                from parity.compare.randomize import randomized

                module: Any = torch_module
                torch_module = randomized(module, seed, weights.carries, lambda name: matches(name, torch_only))
        comparison = cls(
            torch=torch_module,
            flax=flax_module,
            weights=weights,
            inputs=inputs,
            labels=labels,
            channels_last=tuple(channels_last),
            zero_gradients=tuple(zero_gradients),
            device=chosen,
            float64=float64,
            seed=seed,
        )
        if isinstance(weights, Mapped) and weights.choices and callable(torch_module):
            comparison = dataclasses.replace(comparison, weights=resolved(weights, comparison.distances()))
        return comparison

    def distances(self) -> Callable[[Weights], float]:
        """A function from other weights to the distance of Flax's outputs from PyTorch's, in float32."""
        with self.strict_precision(False):
            theirs = self.torch_side("float32")
            reference, ours = theirs.outputs(self.inputs), self.jax_side("float32", theirs.state_dict())

        def distance(weights: Weights) -> float:
            with self.strict_precision(False):
                side = copy.copy(ours)
                side.weights = weights
                return difference(side.loaded(theirs.state_dict()).outputs(self.inputs), reference)

        return distance

    @property
    def precision(self) -> str:
        """The widest dtype in which the Flax module runs."""
        return "float64" if self.float64 else "float32"

    @functools.cached_property
    def returned(self) -> dict[str, Any] | None:
        """Shapes of Flax's outputs by Flax's names; None without a Flax module."""
        return None if self.flax is None else returned(self.flax, self.inputs, self.channels_last)

    def shared(self, outputs: Mapping[str, Any]) -> list[str]:
        """Names of PyTorch's outputs that Flax returns too; all without a Flax module."""
        return list(outputs if self.returned is None else correspondence(outputs, self.returned))

    @functools.cached_property
    def untrained(self) -> frozenset[str]:
        """Parameters that PyTorch does not train, and others whose gradients are not compared."""
        named = () if self.torch is None else self.torch.named_parameters()
        return self.weights.uncompared | {name for name, parameter in named if not parameter.requires_grad}

    @property
    def frozen(self) -> tuple[str, ...]:
        """Patterns of the parameters that no training step changes, on either side."""
        named = {*self.untrained, *self.weights.untrained}
        return (*self.zero_gradients, *map(glob.escape, sorted(named)))

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the calls and the weights, a sentence each."""
        return (*self.inputs.notes, *self.weights.notes)

    @property
    def torch_device(self) -> str:
        """PyTorch's device for narrower dtypes: a GPU if Flax runs on one and PyTorch supports it."""
        import torch

        return "cuda" if self.device.platform == "gpu" and torch.cuda.is_available() else "cpu"

    @contextlib.contextmanager
    def strict_precision(self, float64: bool | None = None) -> Iterator[None]:
        """Run the block without TF32 or bfloat16 matmuls on either side, JAX on `device`, with float64 on or off."""
        with contextlib.ExitStack() as stack:
            if is_torch(self.torch):
                from parity.compare.sides import torch_side

                stack.enter_context(torch_side.strict_precision())
            wide = self.float64 if float64 is None else float64
            stack.enter_context(jax_side.strict_precision(wide, self.device))
            yield

    def state_dict(self, dtype: str) -> Mapping[str, np.ndarray]:
        """PyTorch's weights, floating and complex ones cast to a dtype's width; empty if Flax keeps its own weights."""
        return Cast({} if self.torch is None else self.torch.state_dict(), dtype)

    def torch_side(self, dtype: str, device: str = "cpu") -> "TorchSide":
        """PyTorch's module in a dtype."""
        import torch

        from parity.compare.sides.torch_side import TorchSide

        assert isinstance(self.torch, torch.nn.Module), "a recording has no module to run"
        return TorchSide(self.torch, getattr(torch, dtype), device)

    def jax_side(
        self, dtype: str, state_dict: Mapping[str, Any] | None = None, inputs: Inputs | None = None
    ) -> JaxSide:
        """Flax's module with PyTorch's weights in a dtype, or with those of a state_dict."""
        state_dict = self.state_dict(dtype) if state_dict is None else state_dict
        module = self.weights.load(self.flax, state_dict)
        if dtype not in ("float64", "float32"):
            module = computing_in(module, dtype)
        return JaxSide(module, self.weights, inputs or self.inputs, dtype, self.channels_last)

    def sides(self, dtype: str, device: str = "cpu") -> Sides:
        """Both sides in a dtype, PyTorch's on a device, and the reference for that dtype.

        The reference has rounded weights and inputs too: rounding them is not an error of the computation.
        """
        import torch

        from parity.compare.sides.torch_side import TorchSide

        inputs = self.inputs.rounded(jnp.dtype(dtype))
        theirs = self.torch_side(dtype, device)
        reference = TorchSide(theirs.module, torch.float64, "cpu")
        return Sides(inputs, reference, theirs, self.jax_side(dtype, theirs.state_dict(), inputs))

    def batch(self, outputs: Mapping[str, np.ndarray], inputs: Inputs | None = None) -> Batch:
        """The inputs, labels, and random targets for outputs of these shapes.

        Raises ValueError if no output that both sides return has a finite number.
        """
        check_counted({name: outputs[name] for name in self.shared(outputs)})
        return Batch(inputs or self.inputs, self.labels, random_targets(outputs, self.seed, self.returned))

    def evaluated(
        self, side: "TorchSide", inputs: Inputs | None = None, *, gradients: bool = True
    ) -> tuple[Batch, Kinds]:
        """The batch, and PyTorch's results on it."""
        batch = self.batch(side.outputs(inputs or self.inputs), inputs)
        return batch, side.evaluate(batch, gradients=gradients)
