"""The stamp of a report: versions, device, precision flags, seed and git commit."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax


def joined(stamps: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """One stamp of several: where they differ, all that they say."""
    values: dict[str, dict[str, None]] = {}
    for stamp in stamps:
        for key, value in stamp.items():
            values.setdefault(key, {})[value] = None
    return {key: "; ".join(said) for key, said in values.items()}


def environment(device: "jax.Device", float64: bool, seed: int | None) -> dict[str, str]:
    """Where and how a check ran: versions, device, precision flags, seed, and the git commit it ran in."""
    return software() | {
        "device": f"{device.platform}: {device.device_kind}",
        "matmul precision": "highest, TF32 off",
        "float64": "on the device" if float64 else "PyTorch on the CPU alone",
        "seed": "recorded" if seed is None else str(seed),
        "git commit": commit(),
    }


def software() -> dict[str, str]:
    """The versions, which can be told wherever nothing runs."""
    packages = ["jax", "jaxlib", "flax", "optax", "numpy", "torch"]
    return {
        **{package: version(package) for package in packages},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """The commit of the working directory, with a + where files differ from it; 'none' outside a repository."""
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            cwd=Path.cwd(),
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return said.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "none"
