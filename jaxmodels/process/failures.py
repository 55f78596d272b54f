"""One line for an exception of a library that wrote files, or for want of memory: the reason, and the file.

And the errors of functions that compiled programs call on the host, for which XLA raises a text with tracebacks.
"""

import contextlib
import errno
import functools
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxmodels.process.texts import shortened

# Reasons that operating systems give, in the words of C++ libraries, which put them in long texts; with their numbers.
REASONS = {os.strerror(number): number for number in (28, 122, 27, 30, 13, 1, 5, 2, 24, 107, 116)}

# In errors of XLA on CPUs that begin with INTERNAL; YNNPACK computes its matrix products, and says no reason.
OUT_OF_MEMORY = ("Out of memory allocating", "YNNPACK operation failed")
failed: list[Exception] = []  # the last error of a function on the host
TORCH_OUT_OF_MEMORY = "DefaultCPUAllocator: "  # in an error of PyTorch on CPUs, "can't allocate memory" or "not enough"


def cause(error: BaseException, folder: Path) -> str:
    """Reason of a failed write, with the file inside `folder` that it names; the folder if it names none."""
    chain = list(causes(error))
    for one in chain:
        if isinstance(one, OSError) and one.errno and one.strerror:
            return f"{one.filename or file_in(str(one), folder)}: {one.strerror}"
    for one in chain:
        for reason in REASONS:
            if reason in str(one):
                return f"{file_in(str(one), folder)}: {reason}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    first = lines[0] if len(lines[0]) <= 200 else f"{lines[0][:200]} …"
    return first if str(folder) in first else f"{folder}: {first}"


def refusal(error: BaseException, folder: Path) -> OSError | None:
    """The error as that of the operating system which refused to write in `folder`; None if it is another one."""
    file, _, reason = cause(error, folder).rpartition(": ")
    number = REASONS.get(reason, errno.ENOENT)  # of which libraries handle many, that are no reason
    return None if number == errno.ENOENT else OSError(number, reason, file)


@contextlib.contextmanager
def naming(file: Path) -> Iterator[Path]:
    """Context in which an OSError that names no file, as of a full disk, names this one."""
    try:
        yield file
    except OSError as error:
        if error.filename is None and not isinstance(error, BrokenPipeError):  # NumPy's has no number either
            raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(file)) from error
        raise


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception, those it was raised from or groups, and theirs; each once."""
    found, seen = [error], set()
    while found:
        one = found.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        found += [other for other in (one.__cause__, one.__context__) if other is not None]
        found += one.exceptions if isinstance(one, BaseExceptionGroup) else []


def file_in(text: str, folder: Path) -> str:
    """First path inside a folder that a text names; the folder if there is none."""
    match = re.search(rf"{re.escape(str(folder.absolute()))}[^\s\"'`,;\])]*", text)
    return match[0].rstrip(":.") if match else str(folder)


@contextlib.contextmanager
def memory_naming(where: str | os.PathLike) -> Iterator[None]:
    """Context in which a failure to allocate memory is a MemoryError that names a file or folder."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or str(where) in str(error):
            raise
        reason = shortened(str(error).partition("\n")[0], 300)
        raise MemoryError(f"{where}{': ' * bool(reason)}{reason}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """True if Python, NumPy, XLA or PyTorch could not allocate memory, which is no bug."""
    text = str(error)
    exhausted = text.startswith("RESOURCE_EXHAUSTED") or (
        text.startswith("INTERNAL") and any(words in text for words in OUT_OF_MEMORY)
    )
    on_device = type(error).__name__ == "OutOfMemoryError"  # PyTorch's, which is not imported here
    return isinstance(error, MemoryError) or exhausted or on_device or TORCH_OUT_OF_MEMORY in text


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """Function for `jax.pure_callback` whose ValueError or OSError `original` finds, and JAX does not log."""
    logging.getLogger("jax._src.callback").addFilter(is_not_found)  # once: a logger keeps one of each filter

    @functools.wraps(function, updated=())
    def called(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (ValueError, OSError) as error:
            failed[:] = [error]
            raise

    return called


def original(error: BaseException) -> Exception | None:
    """The error of a function on the host that an error of XLA stands for; None if it is another error."""
    return next((one for one in failed if f"{type(one).__name__}: {one}" in str(error)), None)


def is_not_found(record: logging.LogRecord) -> bool:
    """False for JAX's report of an error that `original` finds."""
    return not record.exc_info or record.exc_info[1] not in failed
