"""Exit codes of the project's commands."""

import contextlib
import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from types import FrameType

from jaxmodels.process.failures import is_out_of_memory, original
from jaxmodels.process.streams import discard, escape_unencodable, is_unwritable, open_missing, say
from jaxmodels.process.texts import shortened


def run(main: Callable[[], int | None], command: str) -> int:
    """Call a command's main function and return the exit code of its process, with one line for each expected failure.

    0 or what `main` returns; 2 for a ValueError or an OSError, also of a function that a compiled program calls on the
    host (`jaxmodels.process.failures.on_host`), for a missing package and for too little memory; 130 for Ctrl-C; 141 if
    the reader of a pipe has closed it (`… | head`). Any other exception is a bug and keeps its traceback.

    Warnings are printed as one line each, without a line of the source. Python processes that it starts import nothing
    from the current folder, unless this process does.

    command: prefix of the line, e.g. "jaxmodels convert".
    """
    open_missing()
    try:
        with warnings_in_one_line(), interruptible(), safe_path():
            escape_unencodable()
            try:
                code = main()
            finally:
                sys.stdout.flush()  # after --help too, which exits by SystemExit
            return code or 0
    except KeyboardInterrupt:
        say(f"{command}: interrupted")
        return 130
    except BrokenPipeError:
        discard(sys.stdout)
        return 141
    except (ValueError, OSError, ModuleNotFoundError) as error:
        unnamed = isinstance(error, OSError) and error.filename is None and is_unwritable(sys.stdout, error)
        say(f"{command}: {'standard output: ' * unnamed}{error}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if (expected := original(error)) is not None:
            say(f"{command}: {expected}")
            return 2
        if not is_out_of_memory(error):
            raise
        reason = shortened(str(error).partition("\n")[0], 400)
        say(f"{command}: not enough memory{': ' * bool(reason)}{reason}")
        return 2


@contextlib.contextmanager
def safe_path() -> Iterator[None]:
    """Context in which child processes do not look for modules in the current folder, unless this process does.

    Python puts it first in the search path of `python -c` and `python -m`, which multiprocessing, joblib and PyTorch
    start: a multiprocessing.py or pip.py there would run.
    """
    name, before = "PYTHONSAFEPATH", os.environ.get("PYTHONSAFEPATH", "")
    if before or imports_from_here():
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ[name] = before  # empty: as if it were not set


def imports_from_here() -> bool:
    """True if the current folder is in this process's search path."""
    try:
        here = os.path.realpath(os.curdir)
        return any(os.path.realpath(place) == here for place in sys.path)
    except OSError:  # the folder was removed
        return False


@contextlib.contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Context in which a warning is printed as `warning: …`, with control characters escaped.

    The function that formats it is replaced, not the one that shows it: `warnings.catch_warnings` still records.
    """
    before = warnings.formatwarning
    warnings.formatwarning = in_one_line
    try:
        yield
    finally:
        warnings.formatwarning = before


def in_one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Text of a warning, as `warnings.formatwarning` returns it."""
    return f"warning: {shortened(' '.join(str(message).split()))}\n"


def end_at_ctrl_c(command: str) -> None:
    """End this process at Ctrl-C with one line and exit code 130, until `run` is called: for slow imports.

    Nothing is raised: extension modules that are being imported turn a KeyboardInterrupt into other errors. Does
    nothing if Ctrl-C is ignored or handled otherwise, as in a notebook.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        global starting
        starting = command
        signal.signal(signal.SIGINT, exit_at_once)


starting = ""  # command whose modules are being imported


def exit_at_once(number: int, frame: FrameType | None) -> None:
    """Signal handler of `end_at_ctrl_c`."""
    with contextlib.suppress(OSError):
        os.write(2, f"{starting}: interrupted\n".encode())
    os._exit(130)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt for every Ctrl-C, also for one that arrives during garbage collection.

    A signal that arrives then is handled in the collector's next Python callback, of which JAX registers one, and
    Python ignores exceptions of such callbacks: the command would go on. Here it is handled a little later.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGINT) not in (signal.default_int_handler, exit_at_once):
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Signal handler: raise KeyboardInterrupt, if need be after a callback of the collector."""
    if not is_repeated(number, frame):
        raise KeyboardInterrupt


@contextlib.contextmanager
def interrupt_held() -> Iterator[Callable[[], bool]]:
    """Context for code of a library that loses a KeyboardInterrupt, or raises another error for it.

    Yields a function that says whether Ctrl-C was pressed, for which KeyboardInterrupt is raised at the end of the
    context, whatever was raised in it. Does nothing where Ctrl-C raises none.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    if not main_thread or handler not in (signal.default_int_handler, interrupt):
        yield lambda: False
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, handler)
        if pressed:
            raise KeyboardInterrupt


def is_repeated(number: int, frame: FrameType | None) -> bool:
    """True in a callback of the collector, where Python ignores exceptions: the signal then comes again in 10 ms."""
    callbacks = [getattr(callback, "__code__", None) for callback in gc.callbacks]
    while frame is not None:
        if frame.f_code in callbacks:
            main_thread = threading.main_thread().ident or 0
            threading.Timer(0.01, signal.pthread_kill, (main_thread, number)).start()
            return True
        frame = frame.f_back
    return False
