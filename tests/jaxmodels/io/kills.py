"""`python -m tests.jaxmodels.io.kills OPERATION STRIDE`: kill an operation before its first, second, … file operation.

Each time a new process does the whole of it on a fresh copy and is killed by SIGKILL. Then the target must be whole,
old or new, once it is recovered; `jaxmodels clean` must list whatever else is left; the operation must succeed when it
is done again; and `jaxmodels clean` must remove the rest. Prints the number of points.
"""

import contextlib
import importlib
import io
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the processes end before another device would be ready

from jaxmodels.io import atomic, clean, manifest

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
TEXT = "".join(f"{i} men and {i * i % 89} women went to sea. " for i in range(40))


def kill_before(number: int, folder: Path) -> None:
    """End this process with SIGKILL before its operation of that number on a file in a folder."""
    counter = itertools.count()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and str(folder) in str(arguments[0]) and next(counter) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def write_folder(target: Path, text: str) -> None:
    with atomic.atomic_folder(target, overwrite=True) as new:
        (new / "configs").mkdir()
        (new / "configs" / "model.yml").write_text(text)
        (new / "config.json").write_text(json.dumps({"text": text}))


def in_two_steps(target: Path, text: str) -> None:
    atomic.exchange = lambda a, b: False
    write_folder(target, text)


def write_file(target: Path, text: str) -> None:
    with atomic.atomic_file(target) as new:
        new.write_text(text)


def write_tokens(target: Path, text: str) -> None:
    from jaxmodels.text import CharVocabulary
    from jaxmodels.training import tokenize

    if not target.exists():
        tokenize.write(target, TEXT, CharVocabulary.of(TEXT))
    assert tokenize.open_tokens(str(target)).vocabulary == CharVocabulary.of(TEXT)


def build_index(target: Path, text: str) -> None:
    from jaxmodels.retro.retrieval import index
    from jaxmodels.retro.retrieval.corpus import Corpus
    from jaxmodels.retro.retrieval.embedders import HashedNGrams
    from jaxmodels.text import CharVocabulary

    index.BATCH, index.SAVE_EVERY = 97, 1
    vocabulary = CharVocabulary.of(TEXT)
    corpus = Corpus.of(vocabulary.encode(TEXT), vocabulary)
    index.ChunkIndex.build(target, corpus, 5, HashedNGrams(16, 1, 2), progress=False)
    assert len(index.ChunkIndex.load(target).neighbors(corpus.passages(corpus.chunks(5)[:3], 5))) == 3


def save_model(target: Path, text: str) -> None:
    from flax import nnx

    import jaxmodels
    from jaxmodels.transformer import AutoregressiveTransformer

    model = AutoregressiveTransformer(7, 6, 3, 5 + len(text), 1, attention="plain", rngs=nnx.Rngs(0))
    jaxmodels.save(model, target, overwrite=True)
    jaxmodels.load(target)


def write_hf(target: Path, text: str) -> None:
    from flax import nnx

    from jaxmodels.convert.hf import save_hf
    from jaxmodels.neox import NeoX, NeoXConfig

    model = NeoX(NeoXConfig(n_vocab=7 + len(text), n_hidden=24, n_layers=1, n_heads=3), rngs=nnx.Rngs(0))
    save_hf(model, target, overwrite=True)


def write_fixture(target: Path, text: str) -> None:
    from jaxmodels.io.formats.safetensors import read_file
    from parity.golden import fixture

    tensors_file, about_file = fixture.files_of(fixture.SHIPPED / "rope.rotary")
    target.mkdir(exist_ok=True)
    tensors = read_file(tensors_file)
    scaled = {name: tensor * len(text) for name, tensor in tensors.items() if name.startswith("state/")}
    about = json.loads(about_file.read_text()) | {"name": text}
    del about["sha256"]
    fixture.write(target / "fixture", tensors | scaled, about)


OPERATIONS: dict[str, Callable[[Path, str], None]] = {
    "folder": write_folder,
    "folder, renamed twice": in_two_steps,
    "file": write_file,
    "tokens": write_tokens,
    "index": build_index,
    "model": save_model,
    "hf": write_hf,
    "fixture": write_fixture,
}
REPLACES = ("folder", "folder, renamed twice", "file", "model", "hf", "fixture")  # a target that exists
GROWS = ("index",)  # its files appear one by one, and it is continued
IMPORTS = {  # before the processes are forked: JAX alone takes seconds
    "tokens": ("jaxmodels.training.tokenize",),
    "index": ("jaxmodels.retro.retrieval.index",),
    "model": ("jaxmodels.transformer",),
    "hf": ("jaxmodels.convert.hf", "jaxmodels.neox"),
    "fixture": ("parity.golden.fixture",),
}


def contents(target: Path) -> object:
    """Content of a file, or names and sizes of a folder's files; of a model's, which have random names, that all are
    there; of a fixture its name, once both files have been read.
    """
    if target.is_file():
        return target.read_text()
    if (target / "fixture.json").is_file():
        from parity.golden.fixture import read

        return read(target / "fixture").name
    if (target / "params" / "state").is_dir():
        complete = json.loads((target / manifest.NAME).read_text())["complete"]
        return complete, manifest.foreign(target), (target / "config.json").read_text()
    files = sorted(file for file in target.rglob("*") if file.is_file())
    return {str(file.relative_to(target)): file.stat().st_size for file in files}


def forked(function: Callable[[], None]) -> int:
    """Exit code of a process that calls a function; negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check(name: str, number: int, before: Path, whole: list[object]) -> bool:
    """Kill an operation at one point and check what is left; False if it ended before that point."""
    operation = OPERATIONS[name]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        target = folder / "target"
        if before.is_dir():
            shutil.copytree(before, target)
        elif before.exists():
            shutil.copy(before, target)

        def killed() -> None:
            kill_before(number, folder)
            operation(target, "new")

        code = forked(killed)
        assert code in (0, -signal.SIGKILL), code
        atomic.recover(target)
        found = contents(target) if target.exists() else None
        assert name in GROWS or found in whole, (number, found)
        left = {path for path in folder.iterdir() if path != target}
        assert left <= set(clean.leftovers(folder)), (number, left)
        assert forked(lambda: operation(target, "new")) == 0, number
        for path in folder.rglob("*"):
            os.utime(path, (time.time() - 2 * manifest.SETTLED,) * 2)
        with contextlib.redirect_stdout(io.StringIO()):
            clean.clean(folder, delete=True)
        assert list(folder.iterdir()) == [target], (number, list(folder.iterdir()))
        assert contents(target) == whole[-1], (number, contents(target))
    return code != 0


def main(name: str, stride: int) -> int:
    """Check every stride-th point of an operation; returns their number."""
    warnings.simplefilter("ignore")  # of JAX, on forks; none of its threads runs in this process
    operation = OPERATIONS[name]
    for module in IMPORTS.get(name, ()):
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as scratch:
        before, new = Path(scratch, "before"), Path(scratch, "new")
        if name in REPLACES:
            assert forked(lambda: operation(before, "older")) == 0
        assert forked(lambda: operation(new, "new")) == 0
        whole = [contents(before) if before.exists() else None, contents(new)]
        points = 0
        while check(name, points * stride, before, whole):
            points += 1
    return points


if __name__ == "__main__":
    print(main(sys.argv[1], int(sys.argv[2])))
