"""The device of a benchmark, the same for both frameworks."""

import argparse
import os
from typing import Any

DEVICES = ("cpu", "gpu")


def add_device(parser: argparse.ArgumentParser, threads: int) -> None:
    """Add --device and --threads."""
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="device for both frameworks (default cpu)")
    help_threads = f"CPU threads for both frameworks (default {threads})"
    parser.add_argument("--threads", type=int, default=threads, help=help_threads)


def use(device: str, threads: int) -> None:
    """Select device and threads of this process. Call it before JAX or PyTorch is imported."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both frameworks share a GPU's memory
    if device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
        # XLA sizes its thread pool once, at start, by the number of processors it may use.
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])

    import torch

    torch.set_num_threads(threads)
    if device == "gpu":
        torch.set_float32_matmul_precision("high")  # TF32, as JAX's default on such devices


def torch_device(device: str) -> str:
    """PyTorch's name of a device."""
    return {"cpu": "cpu", "gpu": "cuda"}[device]


def synchronize(device: str) -> None:
    """Wait until PyTorch's work on the device is done."""
    if device == "gpu":
        import torch

        torch.cuda.synchronize()


def compiled(module: Any) -> Any:
    """`torch.compile(module)`; of a Feedback Transformer its step, for any number of positions before it.

    All positions of a text at once are a graph of hundreds of layers, which takes many minutes to compile.
    """
    import torch

    recurrent = getattr(module, "transformer", module)
    if not hasattr(recurrent, "step"):
        return torch.compile(module)
    recurrent.step = torch.compile(recurrent.step, dynamic=True)
    return module
