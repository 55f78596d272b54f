"""Optimizers: Adam in two forms, AdamW. Schedules: Noam, cosine, constant. Gradient clipping by global norm."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

AdamForm = Literal["original", "torch"]
OptimizerName = Literal["original", "torch", "adamw"]
ScheduleName = Literal["noam", "cosine", "constant"]


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
    form: AdamForm, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """√(1-β₂ᵗ)/(1-β₁ᵗ) · m / (√v + ε), the form of the original experiments, or torch's form.

    torch's (and optax's) m̂ / (√v̂ + ε) equals it with ε·√(1-β₂ᵗ) in place of ε: the originals' ε has more effect in
    the first steps.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        # Separate buffers, because a step donates both.
        mu, nu = optax.tree.zeros_like(params), optax.tree.zeros_like(params)
        return optax.ScaleByAdamState(count=jnp.zeros((), jnp.int32), mu=mu, nu=nu)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, gradients)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, gradients)
        t = jnp.asarray(count, float)
        # 1 - βᵗ as expm1: in float32 the subtraction would be off by 1.3e-5 at the first step
        root = jnp.sqrt(-jnp.expm1(t * math.log(b2)))
        scale = root / -jnp.expm1(t * math.log(b1))
        epsilon = eps * root if form == "torch" else eps
        updates = jax.tree.map(lambda m, v: (scale * m / (jnp.sqrt(v) + epsilon)).astype(m.dtype), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def adam(
    learning_rate: optax.ScalarOrSchedule,
    form: AdamForm = "original",
    max_norm: float | None = 1.0,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Clip gradients unless max_norm is None, apply Adam of that form, multiply by -learning_rate."""
    clip = [] if max_norm is None else [clip_by_norm(max_norm)]
    return optax.chain(*clip, scale_by_adam(form, b1, b2, eps), optax.scale_by_learning_rate(learning_rate))


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    max_norm: float | None = 1.0,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Clip gradients unless max_norm is None, apply AdamW (arXiv 1711.05101) in torch's form; only kernels decay."""
    clip = [] if max_norm is None else [clip_by_norm(max_norm)]
    inner = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=only_kernels)
    return optax.chain(*clip, inner)


def only_kernels(params: dict[str, Any]) -> dict[str, bool]:
    """Mask of the arrays with weight decay: kernels and LoRA's factors, not biases, norms and embeddings."""
    return {path: path.split(".")[-1] in ("kernel", "lora_a", "lora_b") for path in params}


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
