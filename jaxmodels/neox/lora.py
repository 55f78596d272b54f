"""LoRA (arXiv 2106.09685) for GPT-NeoX: fixed linear maps, some of them with a trained update of low rank.

Axes: I input features, O output features, R rank; stacked layers' arrays have a leading layer axis L.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxmodels.layers import Frozen, uniform
from jaxmodels.neox.block import BLOCK_RULES, Block
from jaxmodels.neox.config import LARGEST, NeoXConfig
from jaxmodels.neox.model import NeoX
from jaxmodels.process.texts import quoted
from jaxmodels.weights.names import dotted, flat_arrays, with_arrays
from jaxmodels.weights.stored import shapes_of

# Linear maps of a block by their names in transformers and PEFT: attribute of the block, and the map's name in it.
TARGETS = {
    "query_key_value": ("attention", "qkv_lin"),
    "dense": ("attention", "output"),
    "dense_h_to_4h": ("ffn", "dense_h_h4"),
    "dense_4h_to_h": ("ffn", "dense_h4_h"),
}

# Sharding rules of the two factors: as the kernel's axis beside the rank, which is not divided.
LORA_RULES = tuple(
    rule
    for pattern, spec in BLOCK_RULES
    if pattern.endswith(r"\.kernel")
    for rule in (
        (pattern.removesuffix("kernel") + "lora_a", P(spec[0], None)),
        (pattern.removesuffix("kernel") + "lora_b", P(None, spec[1])),
    )
)


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Hyperparameters of an adapter; the defaults are PEFT's.

    rank: R. alpha: the update is multiplied by alpha / rank. targets: names of TARGETS, in any order.
    Raises ValueError if a value is out of range or of another type.
    """

    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] = ("query_key_value",)

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"rank={quoted(self.rank)} must be an integer of at least 1")
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not number or not 0 < self.alpha <= LARGEST:
            raise ValueError(f"alpha={quoted(self.alpha)} must be above 0 and at most {LARGEST:g}")
        given = self.targets if isinstance(self.targets, tuple | list) else ()
        known = [name for name in TARGETS if name in given]
        if not known or len(known) < len(given):
            shown = " ".join(map(str, given)) if given else self.targets
            raise ValueError(f"targets={quoted(shown)} must be different names of {', '.join(TARGETS)}, at least one")
        object.__setattr__(self, "targets", tuple(known))

    @classmethod
    def of(cls, saved: Any) -> "LoRA":
        """Build from the entry of a config.json; raises ValueError if it is not an object of these fields."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(saved, Mapping) or not saved.keys() <= set(names):
            raise ValueError(f"lora={quoted(saved)} must be an object with {', '.join(names)} alone")
        return cls(**saved)

    @property
    def scale(self) -> float:
        """Factor of the update: alpha / rank."""
        return self.alpha / self.rank


class FrozenLinear(nnx.Module):
    """y = xW + b in the dtype of x, with the kernel and bias of another linear map; W is not trained.

    The backward pass casts W again instead of storing its copy in the dtype of x: a model in float16 that computes in
    float32 is never in memory as a whole in float32.
    """

    def __init__(self, linear: nnx.Linear):
        self.kernel = Frozen(linear.kernel[...])
        self.bias = linear.bias

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., I] -> [..., O]."""
        y = product(x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


@jax.checkpoint
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., I] times a kernel [I, O] of any dtype, in the dtype of x."""
    return x @ kernel.astype(x.dtype)


class LoRALinear(FrozenLinear):
    """y = xW + b + α/R · (xA)B in the dtype of x, with the kernel and bias of another linear map; W is not trained.

    lora_a: A [I, R], drawn from U(-1/√I, 1/√I) as in PEFT. lora_b: B [R, O], zero.
    """

    def __init__(self, linear: nnx.Linear, lora: LoRA, *, rngs: nnx.Rngs):
        super().__init__(linear)
        *layers, d_in, d_out = linear.kernel.shape
        self.lora_a = nnx.Param(uniform(d_in)(rngs.params(), (*layers, d_in, lora.rank)))
        self.lora_b = nnx.Param(jnp.zeros((*layers, lora.rank, d_out)))
        self.scale = lora.scale

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., I] -> [..., O]."""
        narrow = x @ self.lora_a[...].astype(x.dtype)  # [..., R]
        return super().__call__(x) + self.scale * (narrow @ self.lora_b[...].astype(x.dtype))

    def merged(self, dtype: Any = None) -> jax.Array:
        """W + α/R · AB in a dtype, default that of W, computed in float32 or wider and rounded once."""
        kernel = self.kernel[...]
        return merge(kernel, self.lora_a[...], self.lora_b[...], self.scale, jnp.dtype(dtype or kernel.dtype))


@functools.partial(jax.jit, static_argnames="dtype")
def merge(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float, dtype: jnp.dtype) -> jax.Array:
    """W + scale · AB in a dtype: [I, O] and factors [I, R], [R, O], or with a leading layer axis each."""
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    update = jnp.matmul(a.astype(wide), b.astype(wide), precision="highest")
    return (kernel.astype(wide) + scale * update).astype(dtype)


class LoRANeoX(NeoX):
    """NeoX whose blocks have frozen linear maps, the targets with low-rank updates; everything else as NeoX.

    `jaxmodels.load` returns a saved one as a plain NeoX, by `merged`; `jaxmodels.models.load_saved` as it was saved.
    """

    sharding_rules = (
        *((rf"layers\.\d+\.{name}", spec) for name, spec in LORA_RULES),
        *((rf"layers\.{name}", P(None, *spec)) for name, spec in LORA_RULES),
        *NeoX.sharding_rules,
    )

    def __init__(self, config: NeoXConfig, lora: LoRA, *, stacked: bool = True, rngs: nnx.Rngs):
        super().__init__(config, stacked=stacked, rngs=rngs)
        self.lora = lora
        adapt(self, lora, rngs)

    @classmethod
    def of(cls, model: NeoX, lora: LoRA, seed: int = 0) -> "LoRANeoX":
        """Add a new adapter, which computes nothing yet, to a model; all other arrays are shared with it.

        Raises ValueError if the model is not a plain NeoX: quantized, or with an adapter.
        """
        if type(model) is not NeoX or model.quantization is not None:
            kind = type(model).__name__ if type(model) is not NeoX else "quantized NeoX"
            raise ValueError(f"model is a {kind}; an adapter needs a NeoX that is not quantized")
        copy = jax.tree.map(lambda array: array, model)
        adapt(copy, lora, nnx.Rngs(seed))
        abstract = shapes_of(lambda rngs: cls(model.settings, lora, stacked=model.is_stacked, rngs=rngs))
        return with_arrays(abstract, flat_arrays(copy))

    def config(self) -> dict[str, Any]:
        """Arguments of `from_config`, as JSON values."""
        return super().config() | {"lora": dataclasses.asdict(self.lora)}

    @classmethod
    def from_config(  # type: ignore[override]
        cls, *, lora: Mapping[str, Any], stacked: bool = True, rngs: nnx.Rngs, **fields: Any
    ) -> "LoRANeoX":
        """Build the model of a `config()`; raises ValueError if a value is out of range."""
        return cls(NeoXConfig(**fields), LoRA.of(lora), stacked=stacked, rngs=rngs)

    def merged(self, dtype: Any = None, *, free: bool = False) -> NeoX:
        """Plain NeoX with the updates added to the kernels, in a dtype, default theirs; other arrays are shared.

        free: delete the arrays of this model that are merged, one by one. Raises ValueError if finite values of a
        kernel are no longer finite.
        """
        arrays = {dotted(path): array for path, array in flat_arrays(self).items()}
        for words, module in nnx.iter_modules(self):
            if isinstance(module, LoRALinear):
                name, kernel = f"{dotted(words)}.kernel", module.merged(dtype)
                if jnp.isfinite(kernel).sum() < jnp.isfinite(module.kernel[...]).sum():
                    about = f"{name} is not finite with its adapter, of alpha={self.lora.alpha:g}"
                    raise ValueError(f"{about}, in dtype={kernel.dtype}")
                arrays[name] = kernel
                if free:
                    for array in (module.kernel, module.lora_a, module.lora_b):
                        array[...].delete()
        stacked = self.is_stacked
        plain = shapes_of(lambda rngs: NeoX(self.settings, stacked=stacked, rngs=rngs))
        return with_arrays(plain, {path: arrays[dotted(path)] for path in flat_arrays(plain)})


def adapt(model: NeoX, lora: LoRA, rngs: nnx.Rngs) -> None:
    """Replace the linear maps of a model's blocks by frozen ones, in place.

    Raises ValueError for a rank above the model's width: such an adapter would be larger than what it changes.
    """
    if lora.rank > model.settings.n_hidden:
        raise ValueError(f"rank={quoted(lora.rank)} must be at most n_hidden={model.settings.n_hidden}")
    blocks: list[Block] = [model.layers] if model.is_stacked else list(model.layers)
    for block in blocks:
        for target, (owner, name) in TARGETS.items():
            part = getattr(block, owner)
            linear = getattr(part, name)
            setattr(part, name, LoRALinear(linear, lora, rngs=rngs) if target in lora.targets else FrozenLinear(linear))
