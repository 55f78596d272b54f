"""Proof that a Flax model computes what a PyTorch model computes: `parity.check(torch_module, flax_module, inputs)`.

The truth is the PyTorch module in float64. Importing this package imports neither torch nor jax.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parity.checking import check
    from parity.report import Report
    from parity.suggestion import suggest

__all__ = ["Report", "check", "suggest"]


def __getattr__(name: str) -> Any:
    if name == "check":
        from parity.checking import check

        return check
    if name == "suggest":
        from parity.suggestion import suggest

        return suggest
    if name == "Report":
        from parity.report import Report

        return Report
    raise AttributeError(f"module 'parity' has no attribute {name!r}")
