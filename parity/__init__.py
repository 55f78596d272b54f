"""Compare a Flax model with a PyTorch model: `parity.check(torch_module, flax_module, inputs)`.

The reference is the PyTorch module in float64. Importing this package imports neither torch nor jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxmodels.process.extras import require

if TYPE_CHECKING:
    from parity.compare.sides.functions import Function
    from parity.compare.suggest import suggest
    from parity.golden.record import record
    from parity.golden.replay import replay
    from parity.measure.check import check
    from parity.measure.dtypes import sweep
    from parity.measure.invariances import invariances
    from parity.measure.optimizers import Optimizer
    from parity.measure.trajectory import trajectory
    from parity.report.report import Report
    from parity.report.write import write

__all__ = [
    "Function",
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

# Modules of the names above, imported at first use.
MODULES = {
    "Function": "compare.sides.functions",
    "Optimizer": "measure.optimizers",
    "Report": "report.report",
    "check": "measure.check",
    "invariances": "measure.invariances",
    "record": "golden.record",
    "replay": "golden.replay",
    "suggest": "compare.suggest",
    "sweep": "measure.dtypes",
    "trajectory": "measure.trajectory",
    "write": "report.write",
}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module 'parity' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"parity.{MODULES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name == "torch":
            require("torch", "torch")
        raise


def __dir__() -> list[str]:
    return sorted(__all__)
