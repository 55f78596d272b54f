"""Devices of a TPU topology, described by libtpu on a machine without TPUs."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

# GiB of memory per device that the compiler lets a program use, by the first part of a topology's name.
HBM = {"v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25}
# Chips of the slices that Google Cloud lends, by generation.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
SLICES = {"v4": CUBES, "v5e": FLAT, "v5p": (*CUBES, "4x4x12", "4x8x12", "16x16x16", "16x16x24"), "v6e": FLAT}
# Google Cloud's names of accelerators, v5litepod-16: the number counts chips of v5e and v6e, but TensorCores of v4 and
# v5p, of which a chip has two.
ACCELERATORS = {"v4": "v4", "v5litepod": "v5e", "v5e": "v5e", "v5p": "v5p", "v6e": "v6e"}
CORES = {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1}


def chips(shape: str) -> int:
    """Number of chips of a shape such as 2x4."""
    return math.prod(map(int, shape.split("x")))


def accelerators(generation: str) -> dict[str, str]:
    """Slices of a generation by Google Cloud's name: {"v5e-8": "2x4", …}, by size."""
    slices = sorted(SLICES[generation], key=chips)
    return {f"{generation}-{chips(shape) * CORES[generation]}": shape for shape in slices}


def known(generation: str) -> str:
    """Names of a generation's slices, for an error."""
    names = accelerators(generation)
    return f"{', '.join(f'{generation}:{shape}' for shape in names.values())}, or by accelerator {', '.join(names)}"


def parse_topology(name: str) -> tuple[str, str]:
    """Generation, a key of HBM, and chips of a slice: v5e:2x4 and v5litepod-8 are ("v5e", "2x4").

    Raises ValueError for a name of another form, or an accelerator that is not known.
    """
    kind, separator, size = re.fullmatch(r"([^:\-]*)([:\-]?)(.*)", name, re.S).groups()  # type: ignore[union-attr]
    generation = ACCELERATORS.get(kind) if separator == "-" else kind
    if generation not in HBM:
        forms = ", ".join(HBM)
        raise ValueError(
            f"topology={name!r} must be a generation of {forms} with chips, such as v5e:2x4, or an accelerator, "
            f"such as v5e-8 or v5litepod-8"
        )
    if separator == "-":
        shape = accelerators(generation).get(f"{generation}-{size}")
    else:
        shape = size if re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5}){1,2}", size) else None
    if shape is None:
        cores = "; the number counts TensorCores, two per chip" if CORES[generation] > 1 and separator == "-" else ""
        raise ValueError(f"topology={name!r} must be one of {known(generation)}{cores}")
    return generation, shape


def torus(kind: str) -> int:
    """Number of physical axes of the network of a kind of device, each with two links per chip."""
    return 2 if kind.startswith(("TPU v5 lite", "TPU v5e", "TPU v6")) else 3


def wraps(kind: str, extents: Sequence[int], axis: int) -> bool:
    """True if links connect the two ends of an axis of a slice.

    v5e and v6e close an axis of 16 chips; v4 and v5p all axes, if the slice consists of cubes of 4x4x4.
    """
    if torus(kind) == 2:
        return extents[axis] == 16
    return all(extent % 4 == 0 for extent in extents)


def topology_devices(topology: str) -> Sequence[Any]:
    """Devices of a topology; raises ValueError if libtpu is not installed or does not know it."""
    generation, shape = parse_topology(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("compiling for a TPU needs libtpu: pip install 'jaxmodels[plan]'")
    # without these libtpu queries a TPU machine's metadata server, and waits for it
    settings = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}
    for variable, value in {**settings, "TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")  # the topology's devices do not exist, and no others are needed
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if chips(shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if generation == "v4":
        options["chip_config_name"] = "megacore"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=f"{generation}:{shape}", **options).devices
    except Exception as error:  # of several types, with C++ stack traces in their messages
        cause = str(error).splitlines()[0]
        raise ValueError(f"topology={topology!r} must be one of {known(generation)}: {cause}") from None
