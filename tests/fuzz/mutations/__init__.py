"""Changes of files and folders that readers must refuse or read as they are.

Every function takes a random generator, so that a seed makes the same files again.
"""

import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.fuzz.mutations.archives import mutated_zip
from tests.fuzz.mutations.entries import change_folder, exchange_file
from tests.fuzz.mutations.octets import mutated_bytes, relined
from tests.fuzz.mutations.pickles import mutated_pickle
from tests.fuzz.mutations.rules import mutated_rules, other_template
from tests.fuzz.mutations.tensors import mutated_npy, mutated_safetensors
from tests.fuzz.mutations.trees import is_lines, mutated_json, mutated_lines, mutated_yaml
from tests.fuzz.mutations.values import Rng, choose

__all__ = ["mutate"]

LARGEST = 10**6  # bytes of a file that is changed again
Change = Callable[[bytes, Rng], bytes]
UNFIT: tuple[type[Exception], ...] = (
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    RecursionError,
    NotImplementedError,
    struct.error,
)
UNFIT += (zipfile.BadZipFile, OSError, EOFError, RuntimeError, AttributeError, OverflowError)


def mutate(root: Path, pattern: str, rng: Rng) -> None:
    """Change one file of a folder whose name matches a pattern, in one to three ways, or the folder's entries."""
    files = sorted(file for file in root.rglob(pattern) if file.is_file())
    file, kind = choose(rng, files), rng.random()
    if kind < 0.06:
        exchange_file(file, root, rng)
        return
    if kind < 0.12:
        change_folder(root, rng)
        return
    for _ in range(choose(rng, (1, 1, 2, 3))):
        if file.stat().st_size > LARGEST:  # by the change before; a further one would take gigabytes itself
            return
        content = file.read_bytes()
        try:
            file.write_bytes(choose(rng, fitting(file.name, content))(content, rng))
        except UNFIT:  # it is no longer of that format
            file.write_bytes(mutated_bytes(content, rng))


def fitting(name: str, content: bytes) -> Sequence[Change]:
    """Changes for a file's format."""
    if content[:4] == b"PK\x03\x04":
        return [mutated_zip] * 5 + [mutated_bytes]
    if content[:2] == b"\x80\x02":
        return [mutated_pickle] * 4 + [mutated_bytes]
    if content[:6] == b"\x93NUMPY":
        return [mutated_npy, mutated_bytes]
    if content[8:9] == b"{":
        return [mutated_safetensors] * 5 + [mutated_bytes]
    if name.endswith((".yml", ".yaml")):
        return [mutated_yaml] * 4 + [mutated_bytes, relined]
    if is_lines(content):
        return [mutated_lines] * 4 + [mutated_bytes]
    if name == "tokenizer.json":
        return [mutated_json] * 2 + [mutated_rules] * 4 + [mutated_bytes]
    if name.endswith(".jinja"):
        return [other_template] * 4 + [mutated_bytes, relined]
    if content[:1] in (b"{", b"["):
        return [mutated_json] * 4 + [mutated_bytes]
    return [mutated_bytes] * 3 + ([relined] if name.endswith((".txt", ".jsonl", "latest")) else [])
