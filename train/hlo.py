"""Collectives of a compiled program, read from its text: how many there are, and how many bytes each device moves."""

import dataclasses
import math
import re
from collections import defaultdict

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, **{f"{kind}{n}": n for kind in "suf" for n in (2, 4, 8, 16, 32, 64)}, "c64": 64}
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of a program: how often it runs, and the bytes that a device sends for it in a ring."""

    kind: str
    count: int
    moved: float


def collectives(text: str) -> list[Collective]:
    """By kind, largest first; what stands in a loop counts as often as the loop turns.

    The number of turns is the constant that a loop's condition compares with; a loop without one counts once.
    """
    computations, entry = split_computations(text)
    times = repetitions(computations, entry)
    # An asynchronous collective stands in several computations, its start, its parts and its end, under one channel.
    found: dict[str, tuple[str, int, float]] = {}
    for name, lines in computations.items():
        for line in lines:
            match = COLLECTIVE.search(line)
            if match is None or not times[name]:
                continue
            channel = re.search(r"channel_id=(\d+)", line)
            key = channel[1] if channel else f"{name} {line}"
            count = max(times[name], found[key][1] if key in found else 0)
            found[key] = (match[2], count, count * sent(match[2], largest(match[1]), group_size(line)))
    by_kind: dict[str, list[tuple[str, int, float]]] = defaultdict(list)
    for entry_found in found.values():
        by_kind[entry_found[0]].append(entry_found)
    kinds = [Collective(kind, sum(n for _, n, _ in all_), sum(b for *_, b in all_)) for kind, all_ in by_kind.items()]
    return sorted(kinds, key=lambda collective: -collective.moved)


def split_computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the first to run."""
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        match = COMPUTATION.match(line)
        if match:
            name = match[2]
            computations[name] = []
            entry = name if match[1] else entry
        elif name:
            computations[name].append(line)
    return computations, entry


def repetitions(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs in one run of the program."""
    times: dict[str, int] = dict.fromkeys(computations, 0)

    def visit(name: str, n: int) -> None:
        times[name] += n
        for line in computations[name]:
            called = CALLED.findall(line)
            for branches in BRANCHES.findall(line):
                called += [branch.strip().lstrip("%") for branch in branches.split(",")]
            turns = trips(line, computations) if " while(" in line else 1
            for inner in called:
                if inner in computations:
                    visit(inner, n * turns)

    visit(entry, 1)
    return times


def trips(line: str, computations: dict[str, list[str]]) -> int:
    known = re.search(r"known_trip_count[^\d]*(\d+)", line)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = "\n".join(computations.get(condition[1], ())) if condition else ""
    compared = re.search(r"compare\((.*?)\), direction=LT", lines)
    for operand in re.findall(r"%([\w.\-]+)", compared[1]) if compared else ():
        constant = re.search(rf"%{re.escape(operand)} = s32\[\]\S* constant\((\d+)\)", lines)
        if constant:
            return int(constant[1])
    return 1


def largest(shapes: str) -> int:
    """Bytes of the largest array in a result type; a start's is a tuple of what goes in and what comes out."""
    sizes = [
        math.prod(map(int, filter(None, shape.split(",")))) * BITS[kind] // 8
        for kind, shape in SHAPE.findall(shapes)
        if kind in BITS
    ]
    return max(sizes, default=0)


def group_size(line: str) -> int:
    """How many devices take part together."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]) if axis in sizes)
    return 2


def sent(kind: str, result: int, n: int) -> float:
    """Bytes that each of n devices sends, in a ring, for a collective with a result of so many bytes."""
    match kind:
        case "all-reduce":
            return 2 * result * (n - 1) / n
        case "reduce-scatter":
            return float(result * (n - 1))
        case "collective-permute":
            return float(result)
    return result * (n - 1) / n
