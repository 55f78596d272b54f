"""Kernels of causal dot-product attention: which one serves a device, a dtype and shapes, and calls of the fused ones.

auto: the platform's fused kernel where it applies, otherwise blocks. fused: cuDNN's flash attention on CUDA devices,
splash attention (JAX's Pallas kernel) on TPUs; neither writes the scores to memory. blocks: blocks of queries, each
over its prefix of the keys; any device and dtype. plain: the whole score matrix.

Axes: B batch, H heads, S sequence, d_k features of a head; arrays are head-major, [B, H, S, d_k].
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.extend
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxmodels.sharding import BATCH

Kernel = Literal["auto", "blocks", "fused", "plain"]
Chosen = Literal["blocks", "plain", "cudnn", "splash"]

KERNELS: tuple[Kernel, ...] = get_args(Kernel)
LANES = 128  # a block of splash attention is a multiple of a TPU register's width
LONGEST_BLOCK = 512  # queries or keys of a block of splash attention; its scores take 1 MiB of on-chip memory


class Setting(NamedTuple):
    """Kernel for functions traced in a block, the mesh that divides their arrays, and the mode of Pallas kernels."""

    kernel: Kernel = "auto"
    mesh: Mesh | None = None
    interpret: bool = False


DEFAULT = Setting()
_setting: contextvars.ContextVar[Setting] = contextvars.ContextVar("attention", default=DEFAULT)


@contextlib.contextmanager
def attention_kernel(
    kernel: Kernel = "auto", mesh: Mesh | None = None, *, interpret: bool | None = None
) -> Iterator[None]:
    """Set the kernel of causal attention in functions traced inside the block.

    mesh: with axes data, fsdp and tensor; its devices are the ones compiled for, and arrays are divided over it.
    Without one, the default backend is compiled for. interpret: run splash attention as JAX operations on any device,
    for tests; default as in the enclosing block. jit caches what it traced: jit a new function for each setting.
    Raises ValueError for an unknown kernel.
    """
    check_kernel(kernel)
    interpret = _setting.get().interpret if interpret is None else interpret
    token = _setting.set(Setting(kernel, mesh, interpret))
    try:
        yield
    finally:
        _setting.reset(token)


def check_kernel(kernel: str) -> None:
    """Raises ValueError if a kernel is not one of KERNELS."""
    if kernel not in KERNELS:
        raise ValueError(f"attention_kernel={kernel!r} must be one of {', '.join(KERNELS)}")


def chosen_kernel(query: jax.Array, unfused: str | None = None) -> Chosen:
    """Kernel for queries [B, H, S, d_k] of as many keys; raises ValueError if `fused` is set and does not apply.

    unfused: why no fused kernel applies to this attention, if none does; the end of a sentence about it.
    """
    setting = _setting.get()
    if setting.kernel in ("blocks", "plain"):
        return setting.kernel
    platform = platform_of(setting)
    lacking = unfused or missing(platform, query)
    # A Pallas kernel is not divided by the compiler: without a mesh, arrays may be divided in a way unknown here.
    unknown = setting == DEFAULT and platform == "tpu" and jax.device_count() > 1
    if lacking is None and not unknown:
        return "cudnn" if platform == "cuda" else "splash"
    if setting.kernel == "fused":
        raise ValueError(f"attention_kernel='fused' {lacking}; auto, blocks and plain are allowed here")
    return "blocks"


def platform_of(setting: Setting) -> str:
    """Platform that is compiled for: "tpu", "cuda", or the name of another."""
    if setting.interpret:
        return "tpu"
    backend: Any = jax.extend.backend.get_backend()
    if setting.mesh is not None:  # a topology's devices are of no backend of this process
        device = setting.mesh.devices.flat[0]
        if device.platform != "gpu":
            return device.platform
        backend = device.client
    return "cuda" if "cuda" in backend.platform_version else backend.platform


def missing(platform: str, query: jax.Array) -> str | None:
    """The lack of a platform's fused kernel for these queries, as the end of a sentence; None if nothing."""
    dtype, d_k = query.dtype, query.shape[-1]
    if platform == "cuda":
        if dtype not in (jnp.bfloat16, jnp.float16):
            return f"is cuDNN's kernel here, for bfloat16 and float16, not {dtype}"
        return (
            None if d_k <= 128 and d_k % 8 == 0 else f"needs at most 128 features per head, divisible by 8, not {d_k}"
        )
    if platform != "tpu":
        return f"needs a TPU or a CUDA device, not {platform}"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"is splash attention here, for bfloat16 and float32, not {dtype}"
    config: Any = jax.config
    precision = config.jax_default_matmul_precision
    if dtype == jnp.bfloat16 and precision not in (None, "default", "fastest", "bfloat16"):
        return f"has no bfloat16 products with default_matmul_precision={precision!r} on TPUs"
    return None


def fused_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, scale: float, kernel: Literal["cudnn", "splash"]
) -> jax.Array:
    """Causal softmax(scale · QKᵀ) V by a fused kernel: three [B, H, S, d_k] -> [B, H, S, d_k]."""
    if kernel == "splash":
        return splash_attention(query, key, value, scale)
    q, k, v = (x.swapaxes(1, 2) for x in (query, key, value))  # [B, S, H, d_k]
    x = jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")
    return x.swapaxes(1, 2)


def splash_attention(query: jax.Array, key: jax.Array, value: jax.Array, scale: float) -> jax.Array:
    """Causal splash attention: three [B, H, S, d_k] -> [B, H, S, d_k], on a mesh with B and H divided over it.

    Sequences are padded to whole blocks; rows and heads to multiples of the axes that divide them.
    """
    mesh, interpret = _setting.get().mesh, _setting.get().interpret
    rows, heads = (1, 1) if mesh is None else (math.prod(mesh.shape[axis] for axis in BATCH), mesh.shape["tensor"])
    b, h, s, _ = query.shape
    block, padded = block_length(s)
    padding = [(0, -b % rows), (0, -h % heads), (0, padded - s), (0, 0)]
    # Padded keys come after all real queries, so that the causal mask excludes them.
    q, k, v = (jnp.pad(x.astype(query.dtype), padding) for x in (query * scale, key, value))

    def local(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return splash_kernel(q, k, v, block, interpret)

    if mesh is not None and mesh.size > 1:
        spec = PartitionSpec(BATCH, "tensor")
        local = jax.shard_map(local, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)
    return local(q, k, v)[:b, :h, :s].astype(value.dtype)


def block_length(s: int) -> tuple[int, int]:
    """Length of the blocks of a sequence of s tokens, and the whole number of blocks' length that it is padded to."""
    n = -(-s // LONGEST_BLOCK)
    block = -(-s // (n * LANES)) * LANES
    return block, n * block


def splash_kernel(query: jax.Array, key: jax.Array, value: jax.Array, block: int, interpret: bool) -> jax.Array:
    """Causal softmax(QKᵀ) V on one device: [B, H, S, d_k], S a multiple of block."""
    # Pallas takes a second to import, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, CausalMask, MultiHeadMask, make_splash_mha

    _, h, s, _ = query.shape
    sizes = BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = MultiHeadMask([CausalMask((s, s))] * h)
    kernel = make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    return jax.vmap(kernel)(query, key, value)
