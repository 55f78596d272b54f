"""Proof that a Flax model computes what a PyTorch model computes: `parity.check(torch_module, flax_module, inputs)`.

The truth is the PyTorch module in float64. Importing this package imports neither torch nor jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parity.checking import check
    from parity.golden import record, replay
    from parity.invariances import invariances
    from parity.report import Report
    from parity.suggestion import suggest
    from parity.sweep import sweep
    from parity.trajectories import Optimizer, trajectory

__all__ = [
    "Optimizer",
    "Report",
    "check",
    "invariances",
    "record",
    "replay",
    "suggest",
    "sweep",
    "trajectory",
]

HOMES = {
    "Optimizer": "trajectories",
    "Report": "report",
    "check": "checking",
    "invariances": "invariances",
    "record": "golden",
    "replay": "golden",
    "suggest": "suggestion",
    "sweep": "sweep",
    "trajectory": "trajectories",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'parity' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"parity.{HOMES[name]}"), name)
    globals()[name] = found  # a function may be called as its module is: importing that would hide it
    return found
