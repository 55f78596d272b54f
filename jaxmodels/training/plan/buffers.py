"""The contents of HBM at a compiled program's peak, by kind, read from the compiler's buffer report."""

import dataclasses
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from jaxmodels.training.plan.hlo import ARRAY, BITS, dims, instructions, repetitions, split_computations

ALLOCATION = re.compile(r"allocation \d+: size (\d+)(.*)")
VALUE = re.compile(r" value: <\d+ (\S+?)(?:\{([\d,]*)\})? (?:\(phi\) )?@\d+> \(size=(\d+),offset=(\d+)\): (.*)")
RANGE = re.compile(r"^    (\S+)\{([\d,]*)\}:(\d+)-(\d+)$", re.M)
# Last names of an operation that computes a gradient of a parameter, not a copy of it.
COMPUTES = (
    "dot_general",
    "scatter-add",
    "add",
    "add_any",
    "mul",
    "reduce_sum",
    "broadcast_in_dim",
    "conv_general_dilated",
)


REPORT = ("", "-buffer-assignment", "-live-range")  # ends of the names of the files: program, places, lifetimes


class Buffer(NamedTuple):
    """A value in HBM: first and last instruction of the schedule that need it, place, and its type."""

    name: str
    first: int
    last: int
    offset: int
    size: int
    type: str


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes on one device by which arrays are told apart.

    shards: of each parameter's part on a device; whole: of any parameter with some of its axes gathered; vocabulary:
    sizes of the logits' last axis; tokens: number of a device's tokens, 0 if it is not known.
    """

    shards: frozenset[tuple[int, ...]]
    whole: frozenset[tuple[int, ...]]
    vocabulary: frozenset[int]
    tokens: int = 0

    @classmethod
    def of(
        cls, parameters: Iterable[tuple[tuple[int, ...], tuple[int, ...]]], vocabulary: Iterable[int], tokens: int = 0
    ) -> "Shapes":
        """Build from the shape of each parameter and of a device's part of it; stacked layers are the leading axis."""
        shards: set[tuple[int, ...]] = set()
        whole: set[tuple[int, ...]] = set()
        for shape, shard in parameters:
            if math.prod(shape) <= max(shape):
                continue  # vectors look like many other arrays
            options = [sorted({a, b}) for a, b in zip(shape, shard, strict=True)]
            for sizes in itertools.product(*options):
                for kept in (sizes, sizes[1:]):
                    if len(squeezed(kept)) > 1:
                        (shards if sizes == shard else whole).add(squeezed(kept))
        return cls(frozenset(shards), frozenset(whole - shards), frozenset(vocabulary), tokens)

    def parameter(self, shape: tuple[int, ...]) -> bool:
        return any(each in group for each in (shape, shape[::-1]) for group in (self.shards, self.whole))

    def gathered(self, shape: tuple[int, ...]) -> bool:
        return not any(each in self.shards for each in (shape, shape[::-1]))


def squeezed(shape: Iterable[int]) -> tuple[int, ...]:
    """Sizes above 1."""
    return tuple(size for size in shape if size > 1)


def dump_options(folder: Path) -> dict[str, str | bool]:
    """Options of a compilation that writes its buffer report to a folder."""
    return {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}


def placed(folder: Path) -> bool:
    """True once the compiler has accepted the places of a program's buffers and written its report."""
    return next(folder.glob("*.after_optimizations_after_buffer_assignment.txt"), None) is not None


def program_text(folder: Path) -> str:
    """HLO text of the program in a report, as it is scheduled."""
    return next(folder.glob("*.after_optimizations.txt")).read_text()


def parts_at_peak(folder: Path, shapes: Shapes) -> dict[str, int]:
    """Bytes in HBM when most is held, by kind; {} if the folder has no report that can be read.

    Kinds: parameters, optimizer, batch, gradients, gathered weights, weights in the compute dtype, saved activations,
    activations (those being computed, and their gradients), logits, other. Temporaries are told apart by their shape
    and by the operation that wrote them. The compiler writes the report of a program that does not fit, too.
    """
    files = [next(iter(folder.glob(f"*.after_optimizations{end}.txt")), None) for end in REPORT]
    if None in files:
        return {}
    text, assigned, ranges = (file.read_text() for file in files if file is not None)
    arguments, rest, buffers = read_report(assigned, ranges)
    lines, entry = split_computations(text)
    operations = operations_of(lines)
    found: dict[str, int] = defaultdict(int, other=rest)
    for names, size in arguments:
        # of the values in an argument's place, the argument itself
        path = next((operations[name][1] for name in names if operations.get(name, ("",))[0] == "parameter"), "")
        state = (
            "optimizer" if ".optimizer" in path else "parameters" if re.search(r"\.(params|fixed)", path) else "batch"
        )
        found[state] += size
    peak = max({buffer.first for buffer in buffers}, key=lambda time: held(buffers, time), default=0)
    backward = any("transpose(" in operations.get(b.name, ("", ""))[1] for b in buffers if b.first == peak)
    trips = {n for n in repetitions(lines, entry).values() if n > 1}
    # A buffer's values: what a loop carries has no operation of its own, but shares its place with what began it.
    places: dict[tuple[int, int], list[Buffer]] = defaultdict(list)
    for buffer in buffers:
        places[buffer.offset, buffer.size].append(buffer)
    end = 0
    for buffer in sorted((b for b in buffers if b.first <= peak <= b.last), key=lambda b: (b.offset, -b.size)):
        own = max(0, buffer.offset + buffer.size - max(end, buffer.offset))
        end = max(end, buffer.offset + buffer.size)
        if own:
            values = related(buffer, places[buffer.offset, buffer.size])
            written = [operations[value.name] for value in values if value.name in operations]
            found[kind_of(buffer, written, shapes, trips, backward)] += own
    return dict(found)


def read_report(assigned: str, ranges: str) -> tuple[list[tuple[list[str], int]], int, list[Buffer]]:
    """Names and bytes of each argument's values, bytes of constants, and the temporaries in HBM."""
    lifetimes = {(name, index): (int(a), int(b)) for name, index, a, b in RANGE.findall(ranges)}
    arguments: list[tuple[list[str], int]] = []
    buffers: list[Buffer] = []
    kind, size, rest = "", 0, 0
    for line in assigned.splitlines():
        if match := ALLOCATION.match(line):
            size, kind = int(match[1]), "" if ", color" in match[2] else match[2]
            rest += size if "constant" in kind else 0
            if ", parameter" in kind:
                arguments.append(([], size))
            continue
        match = VALUE.match(line)
        if match is None or not kind:
            continue
        if ", parameter" in kind:
            arguments[-1][0].append(match[1])
        elif "preallocated-temp" in kind and (span := lifetimes.get((match[1], match[2] or ""))):
            buffers.append(Buffer(match[1], *span, int(match[4]), int(match[3]), match[5]))
    return arguments, rest, buffers


def held(buffers: Iterable[Buffer], time: int) -> int:
    """Bytes of the temporaries that an instruction of the schedule finds; values in the same place count once."""
    total = end = 0
    for offset, size in sorted((b.offset, b.size) for b in buffers if b.first <= time <= b.last):
        total += max(0, offset + size - max(end, offset))
        end = max(end, offset + size)
    return total


def related(buffer: Buffer, others: list[Buffer]) -> list[Buffer]:
    """Values of one place whose lifetimes are connected with a buffer's."""
    first, last, found = buffer.first, buffer.last, [buffer]
    for other in sorted(others, key=lambda b: abs(b.first - buffer.first)):
        if other.first <= last + 1 and first <= other.last + 1:
            first, last = min(first, other.first), max(last, other.last)
            found.append(other)
    return found


def operations_of(lines: Mapping[str, list[str]]) -> dict[str, tuple[str, str]]:
    """Opcode and name of the JAX operation of each instruction."""
    found = {}
    for body in lines.values():
        for each in instructions(body):
            named = re.search(r'op_name="([^"]*)"', each.rest)
            found[each.name] = (each.opcode, named[1] if named else "")
    return found


def kind_of(buffer: Buffer, written: list[tuple[str, str]], shapes: Shapes, trips: set[int], backward: bool) -> str:
    """Kind of a temporary at the peak. backward: the peak is in the backward pass."""
    match = ARRAY.match(buffer.type)
    if match is None or match[1] not in BITS:
        return "other"
    shape = squeezed(dims(match[2]))
    if len(shape) > 1 and shapes.parameter(shape):
        if any(opcode.startswith("all-gather") or buffer.name.startswith("all-gather") for opcode, _ in written):
            return "gathered weights"
        names = [name.rsplit("/", 1)[-1] for _, name in written if name]
        if any(opcode.startswith(("all-reduce", "reduce-scatter")) for opcode, _ in written) or (
            set(names) & set(COMPUTES)
        ):
            return "gradients"
        return "gathered weights" if shapes.gathered(shape) else "weights in the compute dtype"
    if len(shape) > 1 and shape[-1] in shapes.vocabulary:
        return "logits"
    begun = [name for _, name in written if name]
    if len(shape) > 1 and (shape[0] in trips or (backward and begun and not any("transpose(" in n for n in begun))):
        return "saved activations"
    floats = match[1].startswith(("f", "bf"))
    return "activations" if shapes.tokens and floats and math.prod(shape) % shapes.tokens == 0 else "other"
