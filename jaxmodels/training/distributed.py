"""Several processes that train one model: how they find each other, and what they agree on."""

import dataclasses
import os

import jax
import numpy as np

# What the flags of these names are where they are not given; JAX itself reads the first alone.
VARIABLES = {"coordinator": "JAX_COORDINATOR_ADDRESS", "processes": "JAX_NUM_PROCESSES", "process": "JAX_PROCESS_ID"}


@dataclasses.dataclass(frozen=True)
class Processes:
    """How several processes find each other; nothing to say where there is one."""

    distributed: bool = False
    """this is one of several processes, and a TPU pod, Slurm or another that JAX can ask knows the others"""
    coordinator: str | None = None
    """HOST:PORT of process 0, with --processes and --process, where nothing knows it; none: JAX_COORDINATOR_ADDRESS"""
    processes: int | None = None
    """how many processes there are; none: JAX_NUM_PROCESSES"""
    process: int | None = None
    """which of them this is, from 0; none: JAX_PROCESS_ID"""
    peer_timeout: int = 60
    """seconds of silence after which a process counts as dead, and the others end with an error"""

    def initialize(self) -> None:
        """Joins the others, where flags or variables name any; raises ValueError for what `named` refuses."""
        if self.peer_timeout < 1:
            raise ValueError(f"peer_timeout={self.peer_timeout} must be at least 1")
        coordinator, processes, process = self.named()
        if coordinator is None and not self.distributed:
            return
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=self.peer_timeout)

    def named(self) -> tuple[str, int, int] | tuple[None, None, None]:
        """Coordinator, number and index, each from its flag or else its variable; or none of them.

        With --distributed the variables are left to JAX. Raises ValueError where only a part of the three is given, or
        one of them can't be right.
        """
        flags = {"coordinator": self.coordinator, "processes": self.processes, "process": self.process}
        ask = not self.distributed or any(value is not None for value in flags.values())
        given = {
            name: os.environ.get(VARIABLES[name]) or None if value is None and ask else value
            for name, value in flags.items()
        }
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == len(given):
            return None, None, None
        if missing:
            either = " and ".join(f"--{name} (or {VARIABLES[name]})" for name in missing)
            raise ValueError(f"--coordinator, --processes and --process belong together: {either} not given")
        coordinator = str(given["coordinator"])
        processes, process = (as_number(name, given[name]) for name in ("processes", "process"))
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"coordinator={coordinator!r} must be HOST:PORT, such as 10.0.0.2:8476")
        if not 0 <= process < processes:
            raise ValueError(f"process={process} must be from 0 to processes={processes} less one")
        return coordinator, processes, process


def as_number(name: str, given: str | int | None) -> int:
    """Of a flag, which is one, or of its variable, which is text."""
    if not str(given).removeprefix("-").isdecimal():
        raise ValueError(f"{VARIABLES[name]}={given!r} must be a whole number")
    return int(str(given))


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def agree(flag: bool) -> bool:
    """Whether any process says so; all must ask. At once where there is one process."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))
