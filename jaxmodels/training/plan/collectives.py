"""Collectives of a compiled program: their number, the bytes that each device sends, their mesh axes and least time."""

import dataclasses
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from jaxmodels.training.plan import flops
from jaxmodels.training.plan.hlo import bytes_of, elements, repetitions, split_computations
from jaxmodels.training.plan.topology import torus, wraps

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
# Name of the computation of a TPU's reduce-scatter: a fusion of an all-reduce and a slice; only the slice is sent.
SCATTERS = "all-reduce-scatter"


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over the same axes of the mesh: number of runs, and bytes that a device sends.

    seconds: least time on the links between the devices that take part.
    """

    kind: str
    count: int
    moved: float
    axes: str = ""
    seconds: float = 0.0


class Network:
    """Links between the devices of a mesh on a TPU slice."""

    def __init__(self, mesh: Mesh):
        self.shape = dict(mesh.shape)
        devices = list(mesh.devices.flat)
        self.coordinates = [tuple(getattr(device, "coords", (i,))) for i, device in enumerate(devices)]
        self.extents = tuple(max(axis) + 1 for axis in zip(*self.coordinates, strict=True))
        self.kind = devices[0].device_kind
        total = (flops.peak(self.kind) or (0.0, 0.0, None))[2]
        self.link = math.inf if total is None else total / (2 * torus(self.kind))  # bytes/s in one direction

    def axes(self, members: Sequence[int]) -> str:
        """Axes of the mesh along which devices differ, e.g. "fsdp"."""
        places = np.array(np.unravel_index(list(members), tuple(self.shape.values())))
        return "·".join(axis for axis, row in zip(self.shape, places, strict=True) if len(set(row)) > 1)

    def bandwidth(self, members: Sequence[int]) -> float:
        """Bytes/s that each device can send in a ring of these: all links of the physical axes they differ along.

        Along an axis that is not closed to a ring a device at its end has one link. Groups that alternate along an axis
        share its links.
        """
        total = 0.0
        for axis, places in enumerate(zip(*(self.coordinates[member] for member in members), strict=True)):
            distinct = len(set(places))
            if distinct == 1:
                continue
            stride = max(1, (max(places) - min(places)) // (distinct - 1))
            closed = distinct * stride == self.extents[axis] and wraps(self.kind, self.extents, axis)
            total += self.link * (2 if closed else 1) / stride
        return total or math.inf


def collectives(text: str, mesh: Mesh | None = None) -> list[Collective]:
    """Collectives by kind and axes, largest first; one in a loop counts once per iteration.

    Without a mesh, by kind alone, and without times. The number of iterations is the constant that the loop's condition
    compares with; a loop without one counts once.
    """
    computations, entry = split_computations(text)
    times, network = repetitions(computations, entry), None if mesh is None else Network(mesh)
    # An asynchronous collective appears in several computations, its start, its parts and its end, under one channel.
    # It runs as often as its start: its parts may be inside a loop, to overlap with what that computes.
    found: dict[str, Collective] = {}
    for name, lines in computations.items():
        for line in lines:
            match = COLLECTIVE.search(line)
            if match is None or not times[name]:
                continue
            channel = re.search(r"channel_id=(\d+)", line)
            key = channel[1] if channel else f"{name} {line}"
            count = min(times[name], found[key].count if key in found else times[name])
            kind, members = match[2], group(line)
            n = len(members)
            result = bytes_of(result_of_start(kind, match[1]) if match[3] else match[1])
            if name.startswith(SCATTERS):
                kind, result = "reduce-scatter", result // n
            moved = count * sent(kind, result, n)
            if network is None or n < 2:
                found[key] = Collective(kind, count, moved)
            else:
                found[key] = Collective(kind, count, moved, network.axes(members), moved / network.bandwidth(members))
    together: dict[tuple[str, str], list[Collective]] = defaultdict(list)
    for collective in found.values():
        together[collective.kind, collective.axes].append(collective)
    kinds = [
        Collective(kind, sum(c.count for c in all_), sum(c.moved for c in all_), axes, sum(c.seconds for c in all_))
        for (kind, axes), all_ in together.items()
    ]
    return sorted(kinds, key=lambda collective: -collective.moved)


def result_of_start(kind: str, shapes: str) -> str:
    """Results in the type of a collective's start, which is (operands, results, contexts…); each may be a tuple.

    An all-reduce's start has the type of its results only, unless it is wrapped in a generic async operation.
    """
    parts = elements(shapes)
    return shapes if len(parts) < 2 or (kind == "all-reduce" and parts[0][0] != "(") else parts[1]


def group(line: str) -> list[int]:
    """Positions in the mesh of the devices of the first group of one collective; of a permutation, its first cycle."""
    if match := re.search(r"source_target_pairs=\{([\d,{}]*)\}", line):
        targets = {int(a): int(b) for a, b in re.findall(r"\{(\d+),(\d+)\}", match[1])}
        cycle = [next(iter(targets), 0)]
        while (following := targets.get(cycle[-1])) is not None and following not in cycle:
            cycle.append(following)
        return cycle
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return [int(member) for member in match[1].split(",")]
    # [groups,size]<=[sizes]T(permutation): the devices in the order of a transposed grid
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        sizes = [int(size) for size in match[3].split(",")]
        order = [int(axis) for axis in match[4].split(",")] if match[4] else list(range(len(sizes)))
        devices = np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(int(match[1]), int(match[2]))
        return devices[0].tolist()
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", line):
        grid = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        named = re.findall(r"'(\w+)'", match[2])
        ranges = [range(size) if axis in named else range(1) for axis, size in grid.items()]
        return [int(np.ravel_multi_index(place, tuple(grid.values()))) for place in itertools.product(*ranges)]
    return [0, 1]


def sent(kind: str, result: int, n: int) -> float:
    """Bytes that each of n devices sends in a ring for a collective whose result has `result` bytes."""
    match kind:
        case "all-reduce":
            return 2 * result * (n - 1) / n
        case "reduce-scatter":
            return float(result * (n - 1))
        case "collective-permute":
            return float(result)
    return result * (n - 1) / n
