"""Collectives of a compiled program, parsed from its HLO text: their number, and the bytes that each device sends."""

import dataclasses
import math
import re
from collections import defaultdict

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, **{f"{kind}{n}": n for kind in "suf" for n in (2, 4, 8, 16, 32, 64)}, "c64": 64}
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
# Name of the computation of a TPU's reduce-scatter: a fusion of an all-reduce and a slice; only the slice is sent.
SCATTERS = "all-reduce-scatter"
SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a program: number of runs, and bytes that a device sends in a ring."""

    kind: str
    count: int
    moved: float


def collectives(text: str) -> list[Collective]:
    """Collectives by kind, largest first; one in a loop counts once per iteration.

    The number of iterations is the constant that the loop's condition compares with; a loop without one counts once.
    """
    computations, entry = split_computations(text)
    times = repetitions(computations, entry)
    # An asynchronous collective appears in several computations, its start, its parts and its end, under one channel.
    # It runs as often as its start: its parts may be inside a loop, to overlap with what that computes.
    found: dict[str, tuple[str, int, float]] = {}
    for name, lines in computations.items():
        for line in lines:
            match = COLLECTIVE.search(line)
            if match is None or not times[name]:
                continue
            channel = re.search(r"channel_id=(\d+)", line)
            key = channel[1] if channel else f"{name} {line}"
            count = min(times[name], found[key][1] if key in found else times[name])
            kind, n = match[2], group_size(line)
            result = bytes_of(result_of_start(kind, match[1]) if match[3] else match[1])
            if name.startswith(SCATTERS):
                kind, result = "reduce-scatter", result // n
            found[key] = (kind, count, count * sent(kind, result, n))
    by_kind: dict[str, list[tuple[str, int, float]]] = defaultdict(list)
    for entry_found in found.values():
        by_kind[entry_found[0]].append(entry_found)
    kinds = [Collective(kind, sum(n for _, n, _ in all_), sum(b for *_, b in all_)) for kind, all_ in by_kind.items()]
    return sorted(kinds, key=lambda collective: -collective.moved)


def split_computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation by name, and the name of the entry computation."""
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
    """Number of times that each computation runs in one run of the program."""
    times: dict[str, int] = dict.fromkeys(computations, 0)

    def visit(name: str, n: int) -> None:
        times[name] += n
        for line in computations[name]:
            called = CALLED.findall(line)
            for branches in BRANCHES.findall(line):
                called += [branch.strip().lstrip("%") for branch in branches.split(",")]
            iterations = trips(line, computations) if " while(" in line else 1
            for inner in called:
                if inner in computations:
                    visit(inner, n * iterations)

    visit(entry, 1)
    return times


def trips(line: str, computations: dict[str, list[str]]) -> int:
    """Number of iterations of a loop: from 0 to the constant in its condition, by the increment in its body.

    A ring of transfers around a matrix product is such a loop too: its counter is unsigned, and two iterations are
    unrolled.
    """
    known = re.search(r"known_trip_count[^\d]*(\d+)", line)
    if known:
        return int(known[1])
    condition, body = (
        "\n".join(computations.get(name, ())) for name in re.findall(r"(?:condition|body)=%?([\w.\-]+)", line)
    )
    compared = re.search(r"compare\((.*?)\), direction=LT", condition)
    operands = re.findall(r"%([\w.\-]+)", compared[1]) if compared else []
    bound = first_constant(operands, condition)
    if bound is None:
        return 1
    counter = re.search(rf"%{re.escape(operands[0])} = .*get-tuple-element\(.*\), index=(\d+)", condition)
    root = re.search(r"ROOT .* tuple\((.*?)\)", body)
    nexts = re.findall(r"%([\w.\-]+)", root[1]) if root else []
    following = nexts[int(counter[1])] if counter and int(counter[1]) < len(nexts) else ""
    added = re.search(rf"%{re.escape(following)} = \S+ add\((.*?)\)", body)
    step = first_constant(re.findall(r"%([\w.\-]+)", added[1]), body) if added else None
    return math.ceil(bound / (step or 1))


def first_constant(names: list[str], lines: str) -> int | None:
    """Value of the first of these names that is an integer constant."""
    found = (re.search(rf"%{re.escape(name)} = [su]32\[\]\S* constant\((\d+)\)", lines) for name in names)
    return next((int(match[1]) for match in found if match), None)


def bytes_of(shapes: str) -> int:
    """Bytes of all arrays in a type; XLA combines collectives of one kind into one whose result is a tuple."""
    return sum(
        math.prod(map(int, filter(None, shape.split(",")))) * BITS[kind] // 8
        for kind, shape in SHAPE.findall(shapes)
        if kind in BITS
    )


def result_of_start(kind: str, shapes: str) -> str:
    """Results in the type of a collective's start, which is (operands, results, contexts…); each may be a tuple.

    An all-reduce's start has the type of its results only, unless it is wrapped in a generic async operation.
    """
    parts = elements(shapes)
    return shapes if len(parts) < 2 or (kind == "all-reduce" and parts[0][0] != "(") else parts[1]


def elements(shapes: str) -> list[str]:
    """Elements of a tuple type: "((f32[3], s8[]), f32[3]{0:T(8)})" -> "(f32[3], s8[])", "f32[3]{0:T(8)}"."""
    if not shapes.startswith("("):
        return [shapes]
    parts, depth = [""], 0
    for character in shapes[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def group_size(line: str) -> int:
    """Number of devices that take part in one collective."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]) if axis in sizes)
    return 2


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
