"""Whether and how fast a training step would run on a TPU slice, from a machine without one.

    python -m train.plan rope --preset original --topology v5e:2x4 --mesh fsdp=4,tensor=2 --batch-size 64

It compiles the very step that training runs, for the topology, and reads memory and communication from the compiled
program. Needs libtpu: pip install 'jaxmodels[train,plan]'.
"""

import dataclasses
import importlib
import importlib.util
import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any, Generic

import jax
import tyro
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from jaxmodels.sharding import make_mesh
from jaxmodels.training.config import Config, ConfigType
from jaxmodels.training.plan import flops, hlo
from jaxmodels.training.signals import peek
from jaxmodels.training.step import Program

PROGRAM = "python -m train.plan"
GIB = 2**30
# GiB of memory per device that the compiler lets a program have, by the first part of a topology's name.
HBM = {"v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25}
# What the compiler says where there is no room.
EXHAUSTED = (r"Used ([\d.]+)G of ([\d.]+)G hbm", r"temporaries \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)")
NOT_EXPERIMENTS = {"plan", "plot", "evaluate", "sample", "tokenize"}


@dataclasses.dataclass(frozen=True)
class Command(Generic[ConfigType]):
    """Compiles an experiment's training step for a TPU topology and says what it needs."""

    config: tyro.conf.OmitArgPrefixes[ConfigType]
    preset: str
    """which defaults the experiment's flags have"""
    topology: str = "v5e:2x4"
    """generation and chips: v5e:1x1 to v5e:16x16, v5p:2x2x1, v6e:8x8, v4:2x2x1, …"""
    mesh: str = ""
    """devices along the axes data, fsdp and tensor, as in training; data takes the rest"""
    n_vocab: int | None = None
    """size of the vocabulary, which the experiment's text would decide; none: 256, or the published models' 50432"""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a compiled step, per device; times are seconds and lower bounds."""

    arguments: int  # bytes: parameters, optimizer, batch
    temporaries: int  # bytes: activations, gradients, program
    limit: float  # bytes
    flops: float  # of the matrix products, without what is computed again
    collectives: list[hlo.Collective]
    compute: float
    memory: float
    network: float
    seconds_to_compile: float

    @property
    def bound(self) -> tuple[str, float]:
        """What takes longest, and how long."""
        times = {"matrix products": self.compute, "memory": self.memory, "communication": self.network}
        name = max(times, key=lambda name: times[name])
        return name, times[name]


class DoesNotFit(ValueError):
    """A step needs more memory than a device has."""


EXPERIMENTS = ("feedback", "feedback_kv", "neox", "retro", "rope", "rope_value", "synthesizer")


def experiments() -> list[str]:
    """The scripts that train something."""
    return list(EXPERIMENTS)


def config_of(experiment: str) -> type[Config]:
    """The configuration of a script; raises ValueError where there is none of that name."""
    if experiment not in experiments():
        raise ValueError(f"{experiment!r} is no experiment; there are {', '.join(experiments())}")
    return importlib.import_module(f"train.{experiment}").Config


def topology_devices(name: str) -> Sequence[Any]:
    """The devices of a topology; raises ValueError where libtpu is missing or does not know it."""
    generation, _, shape = name.partition(":")
    if generation not in HBM or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ValueError(f"topology={name!r} must be one of {', '.join(HBM)}, a colon and chips, such as v5e:2x4")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("compiling for a TPU needs libtpu: pip install 'jaxmodels[plan]'")
    # without them libtpu asks a TPU machine's metadata server, and waits for it
    settings = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}
    for variable, value in {**settings, "TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")  # the devices of the topology are not there, and no others are needed
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if math.prod(map(int, shape.split("x"))) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if generation == "v4":
        options["chip_config_name"] = "megacore"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:  # of several kinds, with traces of C++ in them
        raise ValueError(f"topology={name!r}: {str(error).splitlines()[0]}") from None


def make_plan(program: Program, batch: dict[str, Any], generation: str) -> Plan:
    """Compiles a step for its mesh of a topology's devices. Raises DoesNotFit where the compiler finds no room."""
    lowered = program.lower_step(batch)
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = next(filter(None, (re.search(pattern, str(error)) for pattern in EXHAUSTED)), None)
        if used is None:
            raise
        need = f"{used[1]} GiB of memory per device, there are {used[2]} GiB"
        raise DoesNotFit(f"does not fit: it needs {need}; {advice(program, generation)}") from None
    seconds = time.perf_counter() - began
    memory, text, n = compiled.memory_analysis(), compiled.as_text(), program.mesh.size
    assert memory is not None, "a TPU's compiler tells it"
    assert text is not None
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporaries = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    work = 3 * flops.of_forward(program, batch)
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
        # each argument is read and its new value written; each temporary, at least once
        memory=2 * (arguments + memory.temp_size_in_bytes) / bandwidth,
        network=sum(collective.moved for collective in found) / (links or math.inf),
        seconds_to_compile=seconds,
    )


def state_bytes(program: Program) -> int:
    """Of what lies on one device between steps."""
    leaves = jax.tree.leaves(program.abstract_state())
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def advice(program: Program, generation: str) -> str:
    """What to change in a step that does not fit."""
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
    """All of a plan, a line each."""
    shown = Table(show_header=False, box=None)
    name, longest = plan.bound
    peak = (flops.peak(mesh.devices.flat[0].device_kind) or (math.inf,))[0]
    rows = {
        "devices": f"{mesh.size} × {mesh.devices.flat[0].device_kind}: "
        + ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
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


def parse(arguments: Sequence[str]) -> Any:
    """The `Command` of an experiment; raises ValueError where it or its preset is not there."""
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(f"name an experiment first: {PROGRAM} {'|'.join(experiments())} --help")
    kind = config_of(arguments[0])
    preset = peek(arguments, "--preset") or kind.PRESETS[0]
    default: Any = Command(kind.of_preset(preset), preset)
    return tyro.cli(Command[kind], default=default, args=arguments[1:], prog=f"{PROGRAM} {arguments[0]}")  # type: ignore[valid-type]


def main(arguments: Sequence[str]) -> None:
    """Prints the table; raises ValueError for bad input, and DoesNotFit, which says what to try."""
    command = parse(arguments)
    settings = command.config
    mesh = make_mesh(command.mesh, topology_devices(command.topology))
    program = settings.program(command.n_vocab or settings.planned_vocab, mesh)
    tokens = settings.batch_size * settings.seq_len
    batch = settings.abstract_batch()
    console = Console(highlight=False, markup=False, width=140)
    parameters = sum(math.prod(leaf.shape) for leaf in program.abstract_state().params.values())
    console.print(
        f"{arguments[0]}, preset {command.preset}: {parameters:,} parameters; {settings.batch_size} sequences of "
        f"{settings.seq_len} tokens; compute {settings.compute_dtype}, parameters {settings.param_dtype}, "
        f"remat {settings.remat}, accumulate {settings.accumulate}"
    )
    plan = make_plan(program, batch, command.topology.partition(":")[0])
    console.print(table(plan, mesh, tokens))
    if plan.arguments + plan.temporaries > plan.limit:
        raise DoesNotFit(f"does not fit: {advice(program, command.topology.partition(':')[0])}")
    console.print("fits")
