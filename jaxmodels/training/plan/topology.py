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


def generation_of(topology: str) -> str:
    """First part of a topology's name, a key of HBM; raises ValueError for a name of another form."""
    generation, _, shape = topology.partition(":")
    if generation not in HBM or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ValueError(f"topology={topology!r} must be one of {', '.join(HBM)}, a colon and chips, such as v5e:2x4")
    return generation


def topology_devices(topology: str) -> Sequence[Any]:
    """Devices of a topology; raises ValueError if libtpu is not installed or does not know it."""
    generation, shape = generation_of(topology), topology.partition(":")[2]
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("compiling for a TPU needs libtpu: pip install 'jaxmodels[plan]'")
    # without these libtpu queries a TPU machine's metadata server, and waits for it
    settings = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}
    for variable, value in {**settings, "TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")  # the topology's devices do not exist, and no others are needed
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if math.prod(map(int, shape.split("x"))) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if generation == "v4":
        options["chip_config_name"] = "megacore"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except Exception as error:  # of several types, with C++ stack traces in their messages
        raise ValueError(f"topology={topology!r}: {str(error).splitlines()[0]}") from None
