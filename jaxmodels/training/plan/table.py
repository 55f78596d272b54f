"""Memory, FLOPs, communication and least time of a compiled training step, and their table."""

import dataclasses
import math
import re
import tempfile
import threading
import time
from pathlib import Path

import jax
from jax.sharding import Mesh
from rich.table import Table

from jaxmodels.sharding import BATCH
from jaxmodels.training.plan import buffers, flops, traffic
from jaxmodels.training.plan.collectives import Collective, collectives
from jaxmodels.training.plan.topology import HBM
from jaxmodels.training.step import Batch, Program

GIB = 2**30
# The compiler's messages when a program does not fit. The second counts temporaries alone.
USED = re.compile(r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm")
TEMPORARIES = re.compile(r"temporaries \(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)")
COMPILER = "compiler"  # name of the thread that compiles
SMALL = 0.005  # share of the peak below which a part is shown with the others


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory and lower bounds of time (seconds) of a compiled step, per device."""

    peak: int  # bytes of HBM, arguments included
    parts: dict[str, int]  # bytes at the peak by kind
    limit: float  # bytes
    flops: float  # of the matrix products on all devices, without recomputation
    accessed: float  # bytes of HBM read and written
    collectives: list[Collective]
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
    """The compiler refuses a step for want of memory. need, limit: in GiB per device."""

    def __init__(self, message: str, need: float, limit: float):
        super().__init__(message)
        self.need, self.limit = need, limit


def make_plan(program: Program, batch: Batch, generation: str, n_vocab: int, *, generate_code: bool = True) -> Plan:
    """Compile a step for its mesh of a topology's devices; raises DoesNotFit if the compiler refuses it for memory.

    generate_code: if not, the plan is made once the compiler has scheduled the program and placed its buffers, which
    takes seconds where code takes minutes. A thread is left that goes on: end the process with `os._exit`.
    """
    lowered = program.lower_step(batch)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="plan-", ignore_cleanup_errors=True) as folder:
        try:
            compile_step(lowered, Path(folder), generate_code)
        except jax.errors.JaxRuntimeError as error:
            parts = buffers.parts_at_peak(Path(folder), shapes_of(program, batch, n_vocab))
            refusal = refused(str(error), parts, program, generation)
            if refusal is None:
                raise
            raise refusal from None
        seconds = time.perf_counter() - began
        text = buffers.program_text(Path(folder))
        parts = buffers.parts_at_peak(Path(folder), shapes_of(program, batch, n_vocab))
    work, n = flops.of_step(program, batch), program.mesh.size
    repeated = 4 / 3 if program.numerics.remat == "layers" else 1.0
    peak, bandwidth, _ = flops.peak(program.mesh.devices.flat[0].device_kind) or (math.inf,) * 3
    found, accessed = collectives(text, program.mesh), traffic.accessed(text)
    return Plan(
        peak=sum(parts.values()),
        parts=parts,
        limit=HBM[generation] * GIB,
        flops=work,
        accessed=accessed,
        collectives=found,
        compute=repeated * work / n / peak,
        memory=accessed / bandwidth,
        network=sum(collective.seconds for collective in found),
        seconds_to_compile=seconds,
    )


def compile_step(lowered: jax.stages.Lowered, folder: Path, generate_code: bool) -> None:
    """Compile with the compiler's report in a folder; raises the compiler's errors. See `make_plan`."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            lowered.compile(compiler_options=buffers.dump_options(folder))
        except BaseException as error:  # raised in the calling thread
            errors.append(error)

    thread = threading.Thread(target=run, name=COMPILER, daemon=True)
    thread.start()
    while thread.is_alive() and (generate_code or not buffers.placed(folder)):
        thread.join(0.05)
    if errors:
        raise errors[0]


def shapes_of(program: Program, batch: Batch, n_vocab: int) -> buffers.Shapes:
    """Sizes of the parameters, of the vocabulary and of a batch on one device."""
    arrays, mesh = program.abstract_state(), program.mesh.shape
    leaves = [*arrays.params.values(), *arrays.fixed.values()]
    parameters = [(leaf.shape, leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves]
    part = n_vocab // (mesh["fsdp"] * mesh["tensor"])  # see `DividedVocabulary`
    divided = [tuple(part if size == n_vocab else size for size in shape) for shape, _ in parameters]
    parameters += [(shape, shape) for shape, (whole, _) in zip(divided, parameters, strict=True) if shape != whole]
    rows, length = batch["tokens"].shape
    tokens = rows * (length - 1) // program.numerics.accumulate // math.prod(mesh[axis] for axis in BATCH)
    return buffers.Shapes.of(parameters, {n_vocab, n_vocab // mesh["tensor"], part}, tokens)


def refused(message: str, parts: dict[str, int], program: Program, generation: str) -> DoesNotFit | None:
    """The compiler's refusal as an error of one line; None if it failed for another reason.

    parts: bytes by kind, as in `Plan`; {} if they are not known.
    """
    match = USED.search(message) or TEMPORARIES.search(message)
    if match is None:
        return None
    need, limit = (gib(size) for size in match.groups())
    need = max(need, sum(parts.values()) / GIB)
    largest = sorted(((size, part) for part, size in parts.items() if part != "other"), reverse=True)[:3]
    held = ", ".join(f"{part} {size / GIB:.3g}" for size, part in largest)
    of_it = f" ({held})" if held else ""
    return DoesNotFit(
        f"does not fit: it needs {need:.4g} GiB of memory per device{of_it}, available {limit:.4g} GiB; "
        f"{advice(program, generation)}",
        need,
        limit,
    )


def gib(size: str) -> float:
    """GiB of a size as the compiler writes it, such as 39.32G or 512.5M."""
    number, unit = float(size.rstrip("KMGT")), size[-1]
    return number * {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}.get(unit, 1) / GIB


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
        "memory per device": f"{plan.peak / GIB:.3g} of {plan.limit / GIB:.4g} GiB",
    }
    shares = {part: size for part, size in plan.parts.items() if part != "other" and size >= SMALL * plan.peak}
    for part, size in sorted(shares.items(), key=lambda item: -item[1]):
        rows[f"    {part}"] = f"{size / GIB:.3g} GiB"
    if shares:
        rows["    other"] = f"{(plan.peak - sum(shares.values())) / GIB:.3g} GiB"
    rows["matrix products of a step"] = f"{plan.flops:.3g} FLOP over all devices, {plan.flops / tokens:.3g} per token"
    rows["memory read and written"] = f"{plan.accessed / GIB:.3g} GiB per device"
    for collective in plan.collectives:
        over = f" over {collective.axes}" if collective.axes else ""
        rows[collective.kind + over] = (
            f"{collective.count:,} a step, {collective.moved / GIB:.3g} GiB sent per device, "
            f"{1e3 * collective.seconds:.3g} ms"
        )
    rows |= {
        "least time: matrix products": f"{1e3 * plan.compute:.3g} ms",
        "least time: memory": f"{1e3 * plan.memory:.3g} ms",
        "least time: communication": f"{1e3 * plan.network:.3g} ms",
        "a step takes at least": f"{1e3 * longest:.3g} ms, bound by {name}: {tokens / longest:,.0f} tokens/s, "
        f"{plan.flops / mesh.size / longest / peak:.0%} of peak",
        "compiler": f"{plan.seconds_to_compile:.1f} s",
    }
    for label, text in rows.items():
        shown.add_row(label, text)
    return shown
