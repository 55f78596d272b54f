"""The stamp of a report: versions, device, precision flags, seed and git commit."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

ROOT = Path(__file__).absolute().parents[2]  # of the checkout, or site-packages


def environment(device: "jax.Device", float64: bool, seed: int | None) -> dict[str, str]:
    """Describe a run: versions, device, precision flags, seed (None: that of a recording) and this project's commit."""
    return software() | {
        "device": f"{device.platform}: {device.device_kind}",
        "matmul precision": "highest, TF32 off",
        "float64": "on the device" if float64 else "PyTorch on the CPU only",
        "seed": "recorded" if seed is None else str(seed),
        "git commit": commit(),
    }


def software() -> dict[str, str]:
    """Date, and versions of packages, Python and the machine; known even if nothing ran."""
    packages = ["jax", "jaxlib", "flax", "optax", "numpy", "torch"]
    return {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
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
    """Git commit of this project's checkout, with a + if files are modified; 'none' if it is installed as a wheel.

    Git runs programs that a repository's configuration names. No other repository is asked, whatever the working
    directory or the environment says, and hooks and the file system monitor are off.
    """
    if not (ROOT / ".git").exists():
        return "none"
    safe = ["-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}", "--no-optional-locks"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *safe, "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            env=own | {"GIT_CEILING_DIRECTORIES": str(ROOT.parent)},
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "none"


def joined(stamps: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Merge stamps, which may be merged ones.

    Values that differ are listed with '; ' between them, of dates the first and the last with ' to '.
    """
    values: dict[str, dict[str, None]] = {}
    for stamp in stamps:
        for key, value in stamp.items():
            values.setdefault(key, {}).update(dict.fromkeys(value.split(" to " if key == "date" else "; ")))
    dates = sorted(values.get("date", ()))
    span = {"date": " to ".join(dict.fromkeys([dates[0], dates[-1]]))} if dates else {}
    return {key: "; ".join(distinct) for key, distinct in values.items()} | span
