"""Proof that a Flax model computes what a PyTorch model computes: `parity.check(torch_module, flax_module, inputs)`.

The truth is the PyTorch module in float64. Importing this package imports neither torch nor jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parity.checking import check
    from parity.dtypes import sweep
    from parity.files import write
    from parity.golden import record, replay
    from parity.invariance import invariances
    from parity.report import Report
    from parity.suggestion import suggest
    from parity.training import Optimizer
    from parity.trajectories import trajectory

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
    "write",
]

HOMES = {
    "Optimizer": "training",
    "Report": "report",
    "check": "checking",
    "invariances": "invariance",
    "record": "golden",
    "replay": "golden",
    "suggest": "suggestion",
    "sweep": "dtypes",
    "trajectory": "trajectories",
    "write": "files",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'parity' has no attribute {name!r}")
    return getattr(importlib.import_module(f"parity.{HOMES[name]}"), name)
