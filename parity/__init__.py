"""Proof that a Flax model computes what a PyTorch model computes: `parity.check(torch_module, flax_module, inputs)`.

The truth is the PyTorch module in float64. Importing this package imports neither torch nor jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parity.compare.suggest import suggest
    from parity.golden.record import record, replay
    from parity.measure.check import check
    from parity.measure.dtypes import sweep
    from parity.measure.invariances import invariances
    from parity.measure.optimizers import Optimizer
    from parity.measure.trajectory import trajectory
    from parity.report.report import Report
    from parity.report.write import write

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
    "Optimizer": "measure.optimizers",
    "Report": "report.report",
    "check": "measure.check",
    "invariances": "measure.invariances",
    "record": "golden.record",
    "replay": "golden.record",
    "suggest": "compare.suggest",
    "sweep": "measure.dtypes",
    "trajectory": "measure.trajectory",
    "write": "report.write",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'parity' has no attribute {name!r}")
    return getattr(importlib.import_module(f"parity.{HOMES[name]}"), name)
