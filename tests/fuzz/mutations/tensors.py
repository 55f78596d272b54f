"""Changes of safetensors and .npy files: the header, with the right length."""

import json
import re
from typing import Any

from tests.fuzz.mutations.trees import mutated_json
from tests.fuzz.mutations.values import INTEGERS, Rng, choose

DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "U8",
    "BOOL",
    "C64",
    "F8_E4M3",
    "F4",
    "I4",
    "",
    "F32 ",
    "\x1b[31m",
    3,
    None,
)
SHAPES = ("(1000000000000000000,)", "(-1,)", "()", "(0,)", "(3, 5, 7)", "(1e3,)", "(2**70,)", "[3]", "(True,)", "None")
DESCRIPTIONS = (
    *("'|O'", "'<f8'", "'<i8'", "'<U9'", "'|V7'", "'<M8[ns]'", "'|b1'", "'<f2'", "'<c16'", "'>i4'", "''", "'x'", "[]"),
    *("[('a', '<i4'), ('a', '<i4')]", "('<i4', (1000000000,))", "'<i4,' * 9", "'|S0'", "'|V0'", "'<U1000000000'"),
)


def mutated_safetensors(content: bytes, rng: Rng) -> bytes:
    """Safetensors file with a change of its header; raises ValueError if the header is not JSON."""
    size = int.from_bytes(content[:8], "little")
    text, values = content[8 : 8 + size], content[8 + size :]
    if rng.random() < 0.5:
        header = json.loads(text)
        names = [name for name in header if name != "__metadata__"]
        change_entry(header, choose(rng, names), names, len(values), rng)
        text = json.dumps(header).encode()
    else:
        text = mutated_json(text, rng)
    return len(text).to_bytes(8, "little") + text + values


def change_entry(header: dict[str, Any], name: str, names: list[str], size: int, rng: Rng) -> None:
    """Change dtype, shape or offsets of one entry, or exchange two."""
    entry, change = header[name], int(rng.integers(7))
    if change == 0:
        entry["dtype"] = choose(rng, DTYPES)
    elif change == 1:
        entry["shape"] = [choose(rng, INTEGERS) for _ in range(int(rng.integers(5)))]
    elif change == 2:
        entry["shape"] = entry["shape"] + [1] * int(rng.integers(1, 100))
    elif change == 3:
        entry["data_offsets"][int(rng.integers(2))] = choose(rng, (*INTEGERS, size, size + 1, size - 1))
    elif change == 4:
        entry["data_offsets"] = list(header[choose(rng, names)]["data_offsets"])
    elif change == 5:
        other = choose(rng, names)
        header[name], header[other] = header[other], header[name]
    else:
        by = int(rng.integers(-8, 9))
        entry["data_offsets"] = [end + by for end in entry["data_offsets"]]


def mutated_npy(content: bytes, rng: Rng) -> bytes:
    """.npy file with another dtype, shape or order in its header."""
    length = int.from_bytes(content[8:10], "little")
    text, values = content[10 : 10 + length], content[10 + length :]
    pattern, new = choose(
        rng,
        (
            (rb"'descr': '[^']*'", f"'descr': {choose(rng, DESCRIPTIONS)}"),
            (rb"'shape': \([^)]*\)", f"'shape': {choose(rng, SHAPES)}"),
            (rb"'fortran_order': \w+", f"'fortran_order': {choose(rng, ('True', '1', 'None', '[]'))}"),
            (rb"\{", choose(rng, ("{" * 300, "{'a': 1, ", "{[", "__import__('os').system('true')#"))),
        ),
    )
    text = re.sub(pattern, lambda match: new.encode(), text, count=1)
    return content[:8] + len(text).to_bytes(2, "little") + text + values
