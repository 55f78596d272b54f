"""Run PyTorch with nothing narrowed: within `widened()` a module in float64 stays there, whatever casts it makes."""

import collections
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from parity.compare.noise import HUGE

WIDE = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64) | {
    torch.complex64: torch.complex128
}
LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


class Wide(TorchDispatchMode):
    """Replaces narrow floating dtypes that an operation asks for.

    casts: those that would have rounded a wide tensor, by dtype and place. replaced: True once there was any.
    """

    def __init__(self) -> None:
        super().__init__()
        self.casts: collections.Counter[str] = collections.Counter()
        self.replaced = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        asked = kwargs.get("dtype")
        if asked in WIDE:
            kwargs["dtype"] = WIDE[asked]
            self.replaced = True
            if any(isinstance(arg, torch.Tensor) and arg.dtype in (torch.float64, torch.complex128) for arg in args):
                self.casts[f"{str(asked).removeprefix('torch.')} at {place()}"] += 1
        return func(*args, **kwargs)


def place() -> str:
    """Origin of the current operation outside PyTorch: 'file.py:12 (function)'."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_qualname})"


class Rounding(TorchDispatchMode):
    """Moves every element that an operation computes by up to `ulp`, relative to its size, as rounding does.

    Views are left alone; infinities and mask constants are too.
    """

    def __init__(self, ulp: float, seed: int) -> None:
        super().__init__()
        self.ulp, self.seed = ulp, seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        aliases = [returned.alias_info for returned in func._schema.returns]
        written = [alias is not None and alias.is_write for alias in aliases]
        if any(alias is not None and not write for alias, write in zip(aliases, written, strict=True)):
            return results  # a view
        for result in results if isinstance(results, tuple | list) else [results]:
            if isinstance(result, torch.Tensor) and (result.is_floating_point() or result.is_complex()):
                self.move(result)
        return results

    def move(self, tensor: torch.Tensor) -> None:
        """Move a tensor in place."""
        if tensor.device not in self.generators:
            self.generators[tensor.device] = torch.Generator(tensor.device).manual_seed(self.seed)
        width = torch.float64 if tensor.dtype in (torch.float64, torch.complex128) else torch.float32
        by = torch.rand(tensor.shape, generator=self.generators[tensor.device], dtype=width, device=tensor.device)
        by = by.mul_(2 * self.ulp).sub_(self.ulp).add_(1.0)
        tensor.copy_(torch.where(tensor.abs() < HUGE, tensor * by, tensor))


@contextlib.contextmanager
def widened(replacing: bool = True) -> Iterator[Wide]:
    """Run the block with float64 as PyTorch's default dtype and every narrowing replaced; yields what was widened.

    replacing: False for a module that is known to narrow nothing. It saves the call into Python at every operation,
    which makes a recurrence several times as slow.
    """
    before, mode = torch.get_default_dtype(), Wide()
    torch.set_default_dtype(torch.float64)
    try:
        # The fused CPU kernel of attention has wrong gradients for rows that are masked by a finite constant.
        with mode if replacing else contextlib.nullcontext(), sdpa_kernel(SDPBackend.MATH):
            yield mode
    finally:
        torch.set_default_dtype(before)
