"""Multi-process training: initialization, and agreement between processes."""

import dataclasses
import os

import jax
import numpy as np

# Environment variables that replace omitted flags. JAX itself reads only the first of them.
VARIABLES = {"coordinator": "JAX_COORDINATOR_ADDRESS", "processes": "JAX_NUM_PROCESSES", "process": "JAX_PROCESS_ID"}


@dataclasses.dataclass(frozen=True)
class Processes:
    """Flags that connect several processes. The defaults are for a single process."""

    distributed: bool = False
    """this is one of several processes, which JAX discovers itself (TPU pod, Slurm, …)"""
    coordinator: str | None = None
    """HOST:PORT of process 0, with --processes and --process, if JAX cannot discover the processes; if omitted:
    JAX_COORDINATOR_ADDRESS"""
    processes: int | None = None
    """number of processes; if omitted: JAX_NUM_PROCESSES"""
    process: int | None = None
    """index of this process, from 0; if omitted: JAX_PROCESS_ID"""
    peer_timeout: int = 60
    """seconds without a heartbeat after which a process counts as dead and the others end with an error"""

    def initialize(self) -> None:
        """Connect to the other processes if flags or variables name any; raises ValueError like `named`."""
        if self.peer_timeout < 1:
            raise ValueError(f"peer_timeout={self.peer_timeout} must be at least 1")
        coordinator, processes, process = self.named()
        if coordinator is None and not self.distributed:
            return
        jax.config.update("jax_enable_preemption_service", False)  # it would handle SIGTERM itself
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=self.peer_timeout)

    def named(self) -> tuple[str, int, int] | tuple[None, None, None]:
        """Coordinator, number and index, each from its flag or else its variable; or three times None.

        With --distributed the variables are left to JAX. Raises ValueError if only some of the three are given, or if
        one of them is invalid.
        """
        flags = {"coordinator": self.coordinator, "processes": self.processes, "process": self.process}
        read_variables = not self.distributed or any(value is not None for value in flags.values())
        given = {
            name: os.environ.get(VARIABLES[name]) or None if value is None and read_variables else value
            for name, value in flags.items()
        }
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == len(given):
            return None, None, None
        if missing:
            either = " and ".join(f"--{name} (or {VARIABLES[name]})" for name in missing)
            raise ValueError(f"--coordinator, --processes and --process go together; missing: {either}")
        coordinator = str(given["coordinator"])
        processes, process = (as_number(name, given[name]) for name in ("processes", "process"))
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"coordinator={coordinator!r} must be HOST:PORT, such as 10.0.0.2:8476")
        if not 0 <= process < processes:
            raise ValueError(f"process={process} must be at least 0 and below processes={processes}")
        return coordinator, processes, process


def as_number(name: str, given: str | int | None) -> int:
    """Parse the value of a flag, an int, or of its variable, a string."""
    if not str(given).removeprefix("-").isdecimal():
        raise ValueError(f"{VARIABLES[name]}={given!r} must be a whole number")
    return int(str(given))


def is_first() -> bool:
    """True in process 0, the only one that prints and writes shared files."""
    return jax.process_index() == 0


def agree(flag: bool) -> bool:
    """True if the flag is set in any process. All processes must call this; returns at once if there is only one."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def to_host(array: jax.Array) -> np.ndarray:
    """Copy an array to the host. Its shards may be on devices of several processes; all must call this."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    assert isinstance(array.sharding, jax.sharding.NamedSharding), "arrays of several processes are placed on a mesh"
    replicated = jax.sharding.NamedSharding(array.sharding.mesh, jax.sharding.PartitionSpec())
    return np.asarray(jax.jit(lambda a: a, out_shardings=replicated)(array))
