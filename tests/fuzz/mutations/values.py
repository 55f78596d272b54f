"""Values that readers are not made for, and choices among them.

A path among them may be removed or written to by a reader with a mistake: all lie in folders of the fuzzers.
"""

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

Rng = np.random.Generator
Value = TypeVar("Value")

CANARY = Path(tempfile.gettempdir()).resolve() / "jaxmodels-fuzz" / "canary.txt"  # its loss is a finding
ENDLESS = CANARY.with_name("zero")  # a link to /dev/zero
SONG = "tweet\n"
INTEGERS = (0, 1, -1, 2, 7, 255, 256, 65535, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, -(2**63), 2**64, 10**9)
NUMBERS: tuple[Any, ...] = (*INTEGERS, 10**300, 0.5, -0.0, -0.5, 1e308, 5e-324, float("nan"), float("inf"))
STRINGS = (
    "",
    " ",
    "../../beside/secret.txt",
    str(CANARY),
    str(ENDLESS),
    "../beside/secret.txt",
    "\x1b]0;title\x07\x1b[2J",
    "\u202egnp.exe",
    "\x9b31m\r\n\x08",
    "a" * 20_000,
    "b" * 2_000_000,
    "\x00",
    "\ud800",
    "é\u0301\U0001f600",
    "NaN",
    "1e400",
    "9" * 5_000,
    "-1",
    "٣",
    "²",
    "true",
    "float8_e4m3fn",
    "float64",
    "O",
    "layers.9999999999.attention.output.weight",
    "gpt_neox.layers.4294967296.mlp.dense_h_to_4h.weight",
    "__class__",
    "name",
    "ngrams:1000000000:1:1000000000",
    "bert:../beside",
    "%s%n{0.__class__}",
    "(a+)+$",
)

# JSON texts that `json.dumps` does not write. A name in them is that of the object's key.
RAW: tuple[str, ...] = (
    "1e400",
    "-1e400",
    "NaN",
    "-Infinity",
    "9" * 4_000,
    "9" * 5_000,
    "-" + "9" * 400,
    "0." + "0" * 400 + "1",
    "[" * 900 + "]" * 900,
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 50_000 + "1" + "}" * 50_000,
    "[" + "[]," * 300_000 + "[]]",
    "[" + "0," * 300_000 + "0]",
    '{"a": 1, "a": 2}',
    '"\\ud800"',
    '"\\u0000"',
    '"\\u001b[2J"',
    "\x1b[2J",
    "nul",
    "'x'",
    "",
    "// x",
)


def choose(rng: Rng, values: Sequence[Value]) -> Value:
    """One of several values, of any types."""
    return values[int(rng.integers(len(values)))]


def alike(value: int, rng: Rng) -> Any:
    """A value that is equal to an integer in Python, or near to it, and another in JSON."""
    others = (float(value), bool(value), str(value), -value, -1, value + 1, value - 1, [value], None)
    return choose(rng, others if abs(value) < 2**53 else others[1:])


def odd_value(rng: Rng) -> Any:
    """A number, string or container that is seldom expected."""
    return choose(rng, (*NUMBERS, *STRINGS, None, True, False, [], {}, [[]], {"": {}}, [None], [1, "a"], {"a": 1}))


def hatch() -> None:
    """Write the canary and the link beside it, unless they are there; other processes may do so at once."""
    CANARY.parent.mkdir(parents=True, exist_ok=True)
    if not sings():
        CANARY.write_text(SONG)
    with contextlib.suppress(FileExistsError):
        ENDLESS.symlink_to("/dev/zero")


def sings() -> bool:
    """True if nothing has changed or removed the canary."""
    return CANARY.is_file() and CANARY.read_text() == SONG
