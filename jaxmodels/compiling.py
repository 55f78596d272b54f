"""Compiler options of programs that are a loop of small kernels: decoding, and training steps."""

import jax.extend

# Operations that a CUDA graph may hold: XLA's default, and loops, which are otherwise run by the host kernel by kernel.
GRAPHED = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"


def loop_options() -> dict[str, str | int] | None:
    """Value of `compiler_options` of an outermost `jax.jit`; None where the default backend needs none.

    On CUDA devices a loop becomes one CUDA graph: an iteration of decoding has hundreds of kernels of a few
    microseconds each, and launching them one by one takes longer than running them.
    """
    if "cuda" not in jax.extend.backend.get_backend().platform_version:
        return None
    return {"xla_gpu_enable_command_buffer": GRAPHED, "xla_gpu_graph_min_graph_size": 1}
