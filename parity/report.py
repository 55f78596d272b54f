"""What a check found: readings with their limits, the first sub-module that diverges, and the stamp of the run."""

import dataclasses
import importlib.metadata
import math
import platform
from typing import Any

import jax

from parity.divergence import Divergence


@dataclasses.dataclass(frozen=True)
class Check:
    """One reading: the worst value among its tensors, that tensor's name, and the most it may be.

    precision 'float64': an error relative to the largest tensor of the kind; 'float32', 'bfloat16', 'float16': Flax's
    error against the truth in units of PyTorch's own; 'bits': tensors that changed.
    """

    kind: str
    precision: str
    worst: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAILED"
        return f"{verdict:6} {self.kind} ({self.precision}): {self.value:.2g}, at most {self.limit:g}, at {self.worst}"


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of one `check`."""

    name: str
    checks: list[Check]
    divergence: Divergence | None
    seconds: float
    environment: dict[str, str]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def value(self, kind: str, precision: str) -> float | None:
        """One reading's value, None where it was not taken."""
        return next((c.value for c in self.checks if (c.kind, c.precision) == (kind, precision)), None)

    def __str__(self) -> str:
        lines = [f"{self.name}: {'agrees' if self.passed else 'DIFFERS'}"]
        lines += [f"  {check}" for check in self.checks]
        if self.divergence:
            lines.append(f"  {self.divergence}")
        elif not self.passed:
            lines.append(
                "  all sub-modules agree in the plain forward pass: look at what is fused, cached or a gradient"
            )
        return "\n".join(lines)

    def raise_if_failed(self) -> None:
        """Raises AssertionError with the whole report where any reading is past its limit."""
        if not self.passed:
            raise AssertionError(str(self))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON has it; infinities as strings."""
        checks = [dataclasses.asdict(c) | {"value": number(c.value), "passed": c.passed} for c in self.checks]
        where = self.divergence
        return {
            "name": self.name,
            "passed": self.passed,
            "seconds": round(self.seconds, 3),
            "checks": checks,
            "divergence": where.to_json() if where else None,
            "environment": self.environment,
        }


def number(value: float) -> float | str:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else str(value)


def environment(device: jax.Device, float64: bool, seed: int) -> dict[str, str]:
    """Where and how a check ran: versions, device, precision flags, seed."""
    packages = ["jax", "jaxlib", "flax", "optax", "numpy", "torch"]
    return {
        **{package: importlib.metadata.version(package) for package in packages},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": f"{device.platform}: {device.device_kind}",
        "matmul precision": "highest, TF32 off",
        "float64": "on the device" if float64 else "PyTorch on the CPU alone",
        "seed": str(seed),
    }
