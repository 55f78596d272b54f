"""Computations of a compiled program: its HLO text, how often each part runs, sizes of its arrays."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16, **{f"{kind}{n}": n for kind in "suf" for n in (2, 4, 8, 16, 32, 64)}, "c64": 64}
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
# An array's type: dtype, sizes, and the layout, which names a memory other than HBM: f32[8,128]{1,0:T(8,128)S(1)}
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
OPERAND = re.compile(r"%([\w.\-]+)")


class Instruction(NamedTuple):
    """One line of a computation. rest: attributes after the operands."""

    name: str
    type: str
    opcode: str
    operands: list[str]
    rest: str
    root: bool


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


def instructions(lines: list[str]) -> Iterator[Instruction]:
    """Instructions of a computation's lines, in the order of the schedule."""
    for line in lines:
        start = re.match(r"^ +(ROOT )?%([\w.\-]+) = ", line)
        if start is None:
            continue
        kind, rest = split_type(line[start.end() :])
        opcode, _, rest = rest.partition("(")
        depth, end = 1, len(rest)
        for match in re.finditer(r"[()]", rest):
            depth += 1 if match[0] == "(" else -1
            if not depth:
                end = match.start()
                break
        operands = [rest[:end]] if opcode in ("parameter", "constant") else OPERAND.findall(rest[:end])
        yield Instruction(start[2], kind, opcode, operands, rest[end + 1 :], bool(start[1]))


def split_type(text: str) -> tuple[str, str]:
    """Type at the beginning of a text, and what follows the space after it."""
    if not text.startswith("("):
        kind, _, rest = text.partition(" ")
        return kind, rest
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return text[: match.end()], text[match.end() + 1 :]
    return text, ""


def dims(shape: str) -> tuple[int, ...]:
    """Sizes of an array from the text between its brackets."""
    return tuple(map(int, filter(None, shape.split(","))))


def bytes_of(shapes: str, *, hbm: bool = False) -> int:
    """Bytes of all arrays in a type; XLA combines collectives of one kind into one whose result is a tuple.

    hbm: only of arrays in HBM, not of those in a faster memory.
    """
    return sum(
        math.prod(dims(shape)) * BITS[kind] // 8
        for kind, shape, layout in ARRAY.findall(shapes)
        if kind in BITS and not (hbm and "S(" in layout)
    )


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
