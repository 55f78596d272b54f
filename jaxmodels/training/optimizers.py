"""Optimizers: Adam in two forms, AdamW, Adafactor, Lion, Muon. Schedules: Noam, cosine, constant.

Parameters are dicts of arrays by dotted path. The layers of some models are stacked: a matrix [L, in, out] holds one
for each of L layers, and what an optimizer does to a matrix, it does to each layer's.
"""

import math
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib

AdamForm = Literal["original", "torch"]
OptimizerName = Literal["original", "torch", "adamw", "adafactor", "lion", "muon"]
ScheduleName = Literal["noam", "cosine", "constant"]
DType = str | None  # of a state; None: that of the parameters

WITHOUT_MOMENTUM: tuple[OptimizerName, ...] = ("adafactor",)
# Optimizers that a hyperparameter has an effect on.
HAVE: dict[str, tuple[OptimizerName, ...]] = {
    "b2": ("original", "torch", "adamw", "muon"),
    "eps": ("original", "torch", "adamw", "muon"),
    "weight_decay": ("adamw", "adafactor", "lion", "muon"),
}
MATRICES = ("kernel", "lora_a", "lora_b")
# Modules that map features to logits, whose matrices Muon leaves to Adam (https://kellerjordan.github.io/posts/muon).
READOUTS = ("generator", "readout", "read")
STACKED = re.compile(r"(.*\.)?layers\.(?!\d)")  # a list of layers has their numbers there


def noam(learning_rate: float, d_model: int, warmup: int) -> optax.Schedule:
    """lr · d_model^-½ · min(t^-½, t · warmup^-3/2), t = 1 at the first update (arXiv 1706.03762, section 5.3)."""

    def schedule(count: jax.Array) -> jax.Array:
        t = jnp.asarray(count + 1, float)
        return learning_rate * d_model**-0.5 * jnp.minimum(t**-0.5, t * warmup**-1.5)

    return schedule


def clip_by_norm(max_norm: float) -> optax.GradientTransformation:
    """g · min(1, max_norm / (‖g‖ + 1e-6)), ‖g‖ over all gradients, as `torch.nn.utils.clip_grad_norm_`."""

    def clip(updates: Any, _: Any) -> Any:
        factor = jnp.minimum(1, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates)

    return optax.stateless(clip)


def scale_by_adam(
    form: AdamForm, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, momentum_dtype: DType = None
) -> optax.GradientTransformation:
    """√(1-β₂ᵗ)/(1-β₁ᵗ) · m / (√v + ε), the form of the original experiments, or torch's form.

    torch's (and optax's) m̂ / (√v̂ + ε) equals it with ε·√(1-β₂ᵗ) in place of ε: the originals' ε has more effect in
    the first steps. m has dtype momentum_dtype.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        # Separate buffers, because a step donates both.
        mu, nu = optax.tree.zeros_like(params, dtype=momentum_dtype), optax.tree.zeros_like(params)
        return optax.ScaleByAdamState(count=jnp.zeros((), jnp.int32), mu=mu, nu=nu)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: b1 * m.astype(jnp.result_type(m, g)) + (1 - b1) * g, state.mu, gradients)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, gradients)
        t = jnp.asarray(count, float)
        # 1 - βᵗ as expm1: in float32 the subtraction would be off by 1.3e-5 at the first step
        root = jnp.sqrt(-jnp.expm1(t * math.log(b2)))
        scale = root / -jnp.expm1(t * math.log(b1))
        epsilon = eps * root if form == "torch" else eps
        updates = jax.tree.map(lambda m, v: (scale * m / (jnp.sqrt(v) + epsilon)).astype(m.dtype), mu, nu)
        return updates, optax.ScaleByAdamState(count, optax.tree.cast(mu, momentum_dtype), nu)

    return optax.GradientTransformation(init, update)


def make_optimizer(
    name: OptimizerName,
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    max_norm: float | None = 1.0,
    b2: float = 0.999,
    eps: float = 1e-8,
    momentum_dtype: DType = None,
) -> optax.GradientTransformation:
    """Optimizer of a name, preceded by the clipping of gradients unless max_norm is None.

    momentum_dtype: dtype of the first moments; averages of squares keep the dtype of the parameters, since bfloat16
    rounds away an update of 1 - b2 = 0.001. Raises ValueError if the optimizer has no first moments.
    """
    check_momentum(name, momentum_dtype)
    match name:
        case "adamw":
            return adamw(learning_rate, weight_decay, max_norm, b2=b2, eps=eps, momentum_dtype=momentum_dtype)
        case "adafactor":
            return adafactor(learning_rate, weight_decay, max_norm)
        case "lion":
            return lion(learning_rate, weight_decay, max_norm, momentum_dtype=momentum_dtype)
        case "muon":
            return muon(learning_rate, weight_decay, max_norm, b2=b2, eps=eps, momentum_dtype=momentum_dtype)
    return adam(learning_rate, name, max_norm, b2=b2, eps=eps, momentum_dtype=momentum_dtype)


def check_momentum(name: OptimizerName, momentum_dtype: DType) -> None:
    """Raises ValueError if an optimizer has no first moments to have a dtype."""
    if momentum_dtype is not None and name in WITHOUT_MOMENTUM:
        raise ValueError(f"momentum_dtype={momentum_dtype}: optimizer={name} has no momentum; omit it")


def without_effect(name: OptimizerName) -> dict[str, str]:
    """Hyperparameters that an optimizer does not have, each with the optimizers that have it."""
    return {
        field: f"optimizer={name} has no {field}; {', '.join(having[:-1])} and {having[-1]} have"
        for field, having in HAVE.items()
        if name not in having
    }


def adam(
    learning_rate: optax.ScalarOrSchedule,
    form: AdamForm = "original",
    max_norm: float | None = 1.0,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    momentum_dtype: DType = None,
) -> optax.GradientTransformation:
    """Clip gradients unless max_norm is None, apply Adam of that form, multiply by -learning_rate."""
    inner = scale_by_adam(form, b1, b2, eps, momentum_dtype)
    return optax.chain(*clipping(max_norm), inner, optax.scale_by_learning_rate(learning_rate))


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    max_norm: float | None = 1.0,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    momentum_dtype: DType = None,
) -> optax.GradientTransformation:
    """Clip gradients unless max_norm is None, apply AdamW (arXiv 1711.05101) in torch's form; only kernels decay."""
    inner = optax.adamw(
        learning_rate, b1, b2, eps, mu_dtype=momentum_dtype, weight_decay=weight_decay, mask=only_kernels
    )
    return optax.chain(*clipping(max_norm), inner)


def lion(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    max_norm: float | None = 1.0,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    momentum_dtype: DType = None,
) -> optax.GradientTransformation:
    """Clip gradients unless max_norm is None, apply Lion (arXiv 2302.06675); only kernels decay."""
    inner = optax.lion(learning_rate, b1, b2, mu_dtype=momentum_dtype, weight_decay=weight_decay, mask=only_kernels)
    return optax.chain(*clipping(max_norm), inner)


def adafactor(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    max_norm: float | None = 1.0,
    *,
    smallest_factored: int = 128,
) -> optax.GradientTransformation:
    """Clip gradients unless max_norm is None, apply Adafactor (arXiv 1804.04235) without momentum; only kernels decay.

    The learning rate is relative to the root mean square of each array. Squared gradients of a matrix are stored as row
    and column means if both sizes are at least smallest_factored. Decay is multiplied by the learning rate, as in
    AdamW and `torch.optim.Adafactor`.
    """
    inner = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=smallest_factored),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )
    return optax.chain(*clipping(max_norm), per_layer(inner), *decay_and_rate(learning_rate, weight_decay))


def muon(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    max_norm: float | None = 1.0,
    *,
    b2: float = 0.999,
    eps: float = 1e-8,
    momentum_dtype: DType = None,
) -> optax.GradientTransformation:
    """Clip gradients unless max_norm is None, apply Muon to the layers' matrices and AdamW to the rest.

    The updates of Muon are multiplied by 0.2·√max(in, out), so that they are as large as AdamW's and learning rates and
    weight decays for AdamW serve for both (arXiv 2502.16982; `adjust_lr_fn="match_rms_adamw"` of `torch.optim.Muon`).
    Only kernels decay. `muon_axes` says which arrays are matrices of layers.
    """

    def labels(params: dict[str, Any]) -> dict[str, str]:
        return {path: "adam" if muon_axes(path, array.ndim) is None else "muon" for path, array in params.items()}

    def axes(params: dict[str, Any]) -> dict[str, Any]:
        # The arrays of the others are empty nodes here, which must stay where they are.
        return {
            path: muon_axes(path, array.ndim) if hasattr(array, "ndim") else array for path, array in params.items()
        }

    def as_large_as_adam(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda u: 0.2 * math.sqrt(max(u.shape[-2:])) * u, updates)

    orthogonal = optax.chain(
        optax.contrib.scale_by_muon(mu_dtype=momentum_dtype, weight_dimension_numbers=axes),
        optax.stateless(as_large_as_adam),
    )
    adam_part = optax.scale_by_adam(b2=b2, eps=eps, mu_dtype=momentum_dtype)
    inner = optax.partition({"muon": orthogonal, "adam": adam_part}, labels)
    return optax.chain(*clipping(max_norm), inner, *decay_and_rate(learning_rate, weight_decay))


def muon_axes(path: str, ndim: int) -> optax.contrib.MuonDimensionNumbers | None:
    """Axes (in, out) of the matrices that Muon updates, the last two; None for an array that AdamW updates.

    Muon updates kernels and LoRA's factors, [in, out] or stacked [L, in, out], but not the readout's.
    """
    name = path.split(".")
    if name[-1] not in MATRICES or name[0] in READOUTS or ndim != 2 + is_stacked(path, ndim):
        return None
    return optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)


def is_stacked(path: str, ndim: int) -> bool:
    """True if the first axis counts layers: in a module `layers` that is not a list, and for kernels of three axes."""
    return ndim > 0 and (STACKED.match(path) is not None or (path.split(".")[-1] in MATRICES and ndim == 3))


def per_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Apply a transformation to each array by itself, and to each layer of a stacked array by itself.

    Its state is a dict of the inner states by path; those of a stacked array have the axis of layers in front.
    """

    def each(function: Callable[..., Any], path: str, ndim: int) -> Callable[..., Any]:
        return jax.vmap(function) if is_stacked(path, ndim) else function

    def init(params: dict[str, Any]) -> dict[str, Any]:
        return {path: each(inner.init, path, array.ndim)(array) for path, array in params.items()}

    def update(gradients: dict[str, Any], state: dict[str, Any], params: Any = None) -> tuple[Any, Any]:
        found = {
            path: each(inner.update, path, array.ndim)(gradients[path], state[path], array)
            for path, array in params.items()
        }
        return {path: update for path, (update, _) in found.items()}, {path: new for path, (_, new) in found.items()}

    return optax.GradientTransformation(init, update)


def clipping(max_norm: float | None) -> list[optax.GradientTransformation]:
    return [] if max_norm is None else [clip_by_norm(max_norm)]


def decay_and_rate(
    learning_rate: optax.ScalarOrSchedule, weight_decay: float
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Add the decay of kernels to the updates, and multiply by -learning_rate."""
    return optax.add_decayed_weights(weight_decay, mask=only_kernels), optax.scale_by_learning_rate(learning_rate)


def only_kernels(params: dict[str, Any]) -> dict[str, bool]:
    """Mask of the arrays with weight decay: kernels and LoRA's factors, not biases, norms and embeddings."""
    return {path: path.split(".")[-1] in MATRICES for path in params}


def make_schedule(name: ScheduleName, learning_rate: float, *, width: int, warmup: int, steps: int) -> optax.Schedule:
    """Noam; cosine: linear to learning_rate in `warmup` steps, then down to a tenth at `steps`; or constant.

    Raises ValueError if a cosine has no steps after its warmup.
    """
    if name == "noam":
        return noam(learning_rate, width, warmup)
    if name == "constant":
        return optax.constant_schedule(learning_rate)
    if warmup >= steps:
        raise ValueError(f"schedule=cosine needs warmup={warmup} below steps={steps}")
    return optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps, learning_rate / 10)
