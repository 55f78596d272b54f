"""Bytes that a compiled program reads from and writes to HBM, counted in its HLO text."""

import re
from collections.abc import Mapping

from jaxmodels.training.plan.hlo import Instruction, bytes_of, elements, instructions, repetitions, split_computations

# Instructions that move no data of their own; the computations that a loop or call names are counted themselves.
FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "iota", "opt-barrier", "add-dependency"),
}
SLICES = {"dynamic-slice", "slice", "gather"}  # read only as much of their first operand as they return
VIEWS = {"bitcast", "reshape", "copy", "convert", "transpose"}  # passed through inside a fusion
COLLECTIVES = {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"}
KERNELS = ("tpu_custom_call", "tpu_custom_call_v2")


def accessed(text: str) -> int:
    """Bytes read and written in one run of a program, each operand and result of an instruction counted once.

    Arrays in VMEM do not count. A fusion that slices an operand reads the slice alone, and one that updates an array in
    place writes the update alone. A kernel may read an operand several times; that is not known here.
    """
    lines, entry = split_computations(text)
    computations = {name: list(instructions(body)) for name, body in lines.items()}
    types = {each.name: each.type for body in computations.values() for each in body}
    fused = set(re.findall(r"(?: fusion\(.*?calls=|to_apply=)%?([\w.\-]+)", text))
    asynchronous = set(re.findall(r" async-\w+\(.*?calls=%?([\w.\-]+)", text))
    times, total = repetitions(lines, entry), 0
    for name, body in computations.items():
        if times[name] and name not in fused and name not in asynchronous:
            total += times[name] * sum(_moved(each, types, computations) for each in body)
    return total


def _moved(each: Instruction, types: Mapping[str, str], computations: Mapping[str, list[Instruction]]) -> int:
    """Bytes that one run of an instruction of the schedule reads and writes."""
    operands = [types.get(name, "") for name in each.operands]
    if each.opcode in FREE or each.opcode.endswith(("-done", "-update")):
        return 0
    if each.opcode == "custom-call" and not any(f'"{kernel}"' in each.rest for kernel in KERNELS):
        return 0  # allocations and other marks of the compiler
    if each.opcode == "fusion":
        return _of_fusion(each, operands, computations)
    if each.opcode == "copy-start":  # (destination, source, context)
        return _hbm(elements(each.type)[0]) + _hbm(elements(each.type)[1])
    if each.opcode == "async-start":  # ((sources), destination, context): a slice, or an update of a part
        called = re.search(r"calls=%?([\w.\-]+)", each.rest)
        inner = [i for i in computations.get(called[1] if called else "", ()) if i.opcode not in FREE]
        return sum(_inner(i, operands) for i in inner)
    if each.opcode == "slice-start":  # ((source), destination, context): the same in another notation
        source, destination = elements(each.type)[:2]
        return bytes_of(destination) * (bool(_hbm(source)) + bool(_hbm(destination)))
    if each.opcode.endswith("-start"):  # a collective reads its operands and writes as much as it receives
        results = elements(each.type)
        return sum(map(_hbm, operands)) + _hbm(results[1] if len(results) > 1 else each.type)
    if each.opcode in SLICES:
        return 2 * _hbm(each.type)
    if each.opcode == "dynamic-update-slice":
        return 2 * _hbm(operands[1])
    if each.opcode == "scatter":
        return 3 * sum(map(_hbm, operands[2:]))
    return _hbm(each.type) + sum(map(_hbm, operands))


def _hbm(kind: str) -> int:
    return bytes_of(kind, hbm=True)


def _inner(each: Instruction, operands: list[str]) -> int:
    """Bytes of an asynchronous slice: read where its source lies in HBM, and written where its result does."""
    result = elements(each.type)[0] if each.type.startswith("(") else each.type
    moved = bytes_of(result)
    return moved * (bool(operands and _hbm(operands[0])) + bool(_hbm(result)))


def _of_fusion(each: Instruction, operands: list[str], computations: Mapping[str, list[Instruction]]) -> int:
    called = re.search(r"calls=%?([\w.\-]+)", each.rest)
    body = computations.get(called[1] if called else "", [])
    parameters = {int(i.operands[0]): i.name for i in body if i.opcode == "parameter"}
    read = 0
    for index, kind in enumerate(operands):
        if whole := _hbm(kind):
            read += min(whole, _read(parameters.get(index, ""), whole, body, computations))
    root = next((i for i in body if i.root), None)
    if root is None:
        return read + _hbm(each.type)
    by_name = {i.name: i for i in body}
    roots = [by_name[name] for name in root.operands if name in by_name] if root.opcode == "tuple" else [root]
    kinds = elements(each.type)
    if len(roots) != len(kinds):
        return read + _hbm(each.type)
    # A collective that runs beside products is in all their fusions, with its results: it counts at its end.
    passed = {"parameter"} if each.name.startswith("async-collective-done") else {"parameter", *COLLECTIVES}
    written = [(i, kind) for i, kind in zip(roots, kinds, strict=True) if i.opcode not in passed]
    return read + sum(_written(i, kind, by_name, computations) for i, kind in written)


def _read(name: str, whole: int, body: list[Instruction], computations: Mapping[str, list[Instruction]]) -> int:
    """Bytes that a fusion reads of one parameter."""
    total = 0
    for user in body:
        if name not in user.operands:
            continue
        if user.opcode in SLICES and user.operands[0] == name:
            total += bytes_of(user.type)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue  # updated in place
        elif user.opcode in VIEWS:
            total += _read(user.name, whole, body, computations)
        elif user.opcode == "fusion" and (called := re.search(r"calls=%?([\w.\-]+)", user.rest)):
            inner = computations.get(called[1], [])
            names = {int(i.operands[0]): i.name for i in inner if i.opcode == "parameter"}
            for index, operand in enumerate(user.operands):
                if operand == name:
                    total += _read(names.get(index, ""), whole, inner, computations)
        elif not user.root or user.opcode != "tuple":
            return whole
    return min(total, whole)


def _written(
    root: Instruction, kind: str, by_name: Mapping[str, Instruction], computations: Mapping[str, list[Instruction]]
) -> int:
    """Bytes that a fusion writes for one result of type `kind`."""
    whole = _hbm(kind)
    while root.opcode in VIEWS and root.operands and root.operands[0] in by_name:
        root = by_name[root.operands[0]]
    if root.opcode == "dynamic-update-slice" and root.operands[1] in by_name:
        return min(whole, bytes_of(by_name[root.operands[1]].type))
    if root.opcode == "fusion" and (called := re.search(r"calls=%?([\w.\-]+)", root.rest)):
        inner = computations.get(called[1], [])
        last = next((i for i in inner if i.root), None)
        if last is not None and last.opcode != "tuple":
            return _written(last, kind, {i.name: i for i in inner}, computations)
    return whole
