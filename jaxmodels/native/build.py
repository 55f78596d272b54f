"""Compilation of the kernels with the machine's C++ compiler, once for each source, compiler, processor and jax.

The library is written to a folder that only the user can enter, ~/.cache/jaxmodels/native ($XDG_CACHE_HOME is
respected), under a hash of all that it depends on. Nothing but this package's own sources and jax's headers is
compiled.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from jaxmodels.process.texts import shortened
from jaxmodels.weights.precision import log

FOLDER = Path(__file__).parent
SOURCES = [FOLDER / "products.cc", FOLDER / "matmul.cc"]
HEADERS = [FOLDER / "vectors.h", FOLDER / "panels.h"]
SWITCH = "JAXMODELS_NATIVE"  # environment variable: 0 switches the kernels off
OFF = ("0", "false", "no", "off")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-w", "-Wno-psabi")
SECONDS = 180.0  # for the compiler


class BuildError(Exception):
    """The kernels cannot be compiled or loaded; the message says why in one line."""


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """Load the kernels' library, compiling it first if needed; None if that is impossible or switched off.

    A compilation, and the reason if it fails, are logged in one line.
    """
    if os.environ.get(SWITCH, "").strip().lower() in OFF:
        return None
    try:
        return ctypes.CDLL(str(built()))
    except Exception as error:  # whatever it is, the program goes on without the kernels
        log(f"XLA computes all products on this CPU, without the compiled kernels: {one_line(error)}")
        return None


def built() -> Path:
    """Path of the compiled library, which is written atomically; raises BuildError, or OSError if a file cannot be."""
    import jax.ffi

    compiler = find_compiler()
    headers = jax.ffi.include_dir()
    folder = private_folder(cache())
    file = folder / f"kernels-{key(compiler, headers)}.so"
    if file.exists():
        check_own(file)
        return file
    names = " and ".join(source.name for source in SOURCES)
    log(f"compiling {names} with {compiler[0]}, once, into {folder}; {SWITCH}=0 switches the kernels off")
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as temporary:
        made = Path(temporary) / file.name
        run([*compiler, *FLAGS, "-isystem", headers, *map(str, SOURCES), "-o", str(made)])
        check_loads(made)
        os.replace(made, file)
    return file


def find_compiler() -> list[str]:
    """Command of the C++ compiler: $CXX, else c++, g++ or clang++; raises BuildError if there is none."""
    for command in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        words = shlex.split(command)
        found = shutil.which(words[0]) if words else None
        if found is not None:
            return [found, *words[1:]]
    raise BuildError("no C++ compiler was found; install g++, or name one in CXX")


def cache() -> Path:
    """Folder of the compiled libraries. A relative $XDG_CACHE_HOME is ignored, as its specification says.

    It would lie in the current folder, which may be of others.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "jaxmodels" / "native"


def private_folder(folder: Path) -> Path:
    """Make a folder that only the user can enter; raises BuildError if it exists and others could write to it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise BuildError(f"{folder} must be a folder that belongs to this user alone (chmod 700)")
    return folder


def check_own(file: Path) -> None:
    """Raises BuildError if a library in the cache is no regular file of this user that only the user can write."""
    found = file.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise BuildError(f"{file} must be a file that only this user can write")


def key(compiler: list[str], headers: str) -> str:
    """Hash of all that a library depends on: source, flags, compiler, processor, jax and its headers."""
    import jax
    import jaxlib

    digest = hashlib.sha256(b"".join(file.read_bytes() for file in (*SOURCES, *HEADERS)))
    version = run([*compiler, "--version"])
    for part in (*FLAGS, *compiler, version, processor(), jax.__version__, jaxlib.__version__, headers):
        digest.update(b"\0" + part.encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def processor() -> str:
    """Architecture, model and instruction sets of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    wanted = ("flags", "Features", "model name", "CPU part")
    return "\n".join([platform.machine(), *sorted({text for text in lines if text.startswith(wanted)})])


def run(command: list[str]) -> str:
    """Run a compiler and return what it prints; raises BuildError with its first error."""
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"{name} took more than {SECONDS:.0f} s") from None
    if done.returncode != 0:
        errors = [text for text in done.stderr.splitlines() if "error" in text] or done.stderr.splitlines() or ["?"]
        raise BuildError(f"{name} failed with exit code {done.returncode}: {errors[0]}")
    return done.stdout


def check_loads(file: Path) -> None:
    """Raises BuildError if a library cannot be loaded or lacks a function."""
    try:
        loaded = ctypes.CDLL(str(file))
        loaded.Products, loaded.Matmuls  # noqa: B018
    except (OSError, AttributeError) as error:
        raise BuildError(one_line(error)) from None


def one_line(error: Exception) -> str:
    """Message of an error as one printable line."""
    return shortened(" ".join(str(error).split()), 300)
