"""Memory, FLOPs, communication and least time of a compiled training step, and their table."""

import dataclasses
import math
import re
import time

import jax
from jax.sharding import Mesh
from rich.table import Table

from jaxmodels.training.plan import flops, hlo
from jaxmodels.training.plan.topology import HBM
from jaxmodels.training.step import Batch, Program

GIB = 2**30
# Messages of the compiler when a program does not fit.
EXHAUSTED = (r"Used ([\d.]+)G of ([\d.]+)G hbm", r"temporaries \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory and lower bounds of time (seconds) of a compiled step, per device."""

    arguments: int  # bytes: parameters, optimizer, batch
    temporaries: int  # bytes: activations, gradients, program
    limit: float  # bytes
    flops: float  # of the matrix products on all devices, without recomputation
    collectives: list[hlo.Collective]
    compute: float
    memory: float
    network: float
    seconds_to_compile: float

    @property
    def bound(self) -> tuple[str, float]:
        """Name and time of the largest lower bound."""
        times = {"matrix products": self.compute, "memory": self.memory, "communication": self.network}
        name = max(times, key=lambda name: times[name])
        return name, times[name]


class DoesNotFit(ValueError):
    """A step needs more memory than a device has."""


def make_plan(program: Program, batch: Batch, generation: str) -> Plan:
    """Compile a step for its mesh of a topology's devices; raises DoesNotFit if the compiler runs out of memory."""
    lowered = program.lower_step(batch)
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = next(filter(None, (re.search(pattern, str(error)) for pattern in EXHAUSTED)), None)
        if used is None:
            raise
        need = f"{used[1]} GiB of memory per device, available {used[2]} GiB"
        raise DoesNotFit(f"does not fit: it needs {need}; {advice(program, generation)}") from None
    seconds = time.perf_counter() - began
    memory, text, n = compiled.memory_analysis(), compiled.as_text(), program.mesh.size
    assert memory is not None, "a TPU's compiler reports it"
    assert text is not None
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporaries = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    work = 3 * flops.of_forward(program, batch)  # the backward pass is twice the forward pass
    repeated = 4 / 3 if program.numerics.remat == "layers" else 1.0
    peak, bandwidth, links = flops.peak(program.mesh.devices.flat[0].device_kind) or (math.inf,) * 3
    found = hlo.collectives(text)
    return Plan(
        arguments=arguments,
        temporaries=temporaries,
        limit=HBM[generation] * GIB,
        flops=work,
        collectives=found,
        compute=repeated * work / n / peak,
        # each argument is read and its new value written; each temporary is written and read at least once
        memory=2 * (arguments + memory.temp_size_in_bytes) / bandwidth,
        network=sum(collective.moved for collective in found) / (links or math.inf),
        seconds_to_compile=seconds,
    )


def state_bytes(program: Program) -> int:
    """Bytes of the state on one device."""
    leaves = jax.tree.leaves(program.abstract_state())
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def advice(program: Program, generation: str) -> str:
    """Suggest changes to a step that does not fit."""
    state, numerics = state_bytes(program), program.numerics
    share = f"parameters and optimizer take {state / GIB:.3g} GiB of it"
    if state > HBM[generation] * GIB / 2:
        return f"{share}: try more devices along fsdp or tensor, a generation with more memory, or param_dtype=bfloat16"
    less = ["accumulate=" + str(2 * numerics.accumulate), "a smaller batch"]
    if numerics.compute_dtype == "float32":
        less.insert(0, "compute_dtype=bfloat16")
    if numerics.remat != "layers":
        less.insert(0, "remat=layers")
    return f"{share}, activations the rest: try {', '.join(less[:-1])} or {less[-1]}"


def table(plan: Plan, mesh: Mesh, tokens: int) -> Table:
    """Show a plan, one line per quantity. tokens: of a step."""
    shown = Table(show_header=False, box=None)
    name, longest = plan.bound
    kind = mesh.devices.flat[0].device_kind
    peak = (flops.peak(kind) or (math.inf,))[0]
    rows = {
        "devices": f"{mesh.size} × {kind}: " + ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
        "memory per device": f"{(plan.arguments + plan.temporaries) / GIB:.3g} of {plan.limit / GIB:.4g} GiB",
        "    parameters, optimizer, batch": f"{plan.arguments / GIB:.3g} GiB",
        "    temporaries and program": f"{plan.temporaries / GIB:.3g} GiB",
        "matrix products of a step": f"{plan.flops:.3g} FLOP over all devices, {plan.flops / tokens:.3g} per token",
    }
    for collective in plan.collectives:
        rows[collective.kind] = f"{collective.count:,} a step, {collective.moved / GIB:.3g} GiB sent per device"
    rows |= {
        "least time: matrix products": f"{1e3 * plan.compute:.3g} ms",
        "least time: memory": f"{1e3 * plan.memory:.3g} ms",
        "least time: communication": f"{1e3 * plan.network:.3g} ms",
        "a step takes at least": f"{1e3 * longest:.3g} ms, bound by {name}: {tokens / longest:,.0f} tokens/s, "
        f"{plan.flops / mesh.size / longest / peak:.0%} of peak",
        "compiled in": f"{plan.seconds_to_compile:.1f} s",
    }
    for label, text in rows.items():
        shown.add_row(label, text)
    return shown
