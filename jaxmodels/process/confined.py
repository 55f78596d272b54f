"""Work on what others wrote in a child process with limited processor time and memory: a failure of it is a ValueError.

A regular expression or a template may take days, swell, or end the process that runs it, and compiled code cannot be
stopped from within: the operating system ends the child. What the child prints, as a panic of Rust, is discarded.

The operations are functions of JSON values to JSON values, or to `Attached`, which adds bytes. A module has them if it
has a function `operations(*arguments)` that returns them by name.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxmodels.process.texts import shortened

WAITING = 30  # seconds that the child may take for a second of processor time, on a busy machine


@dataclasses.dataclass(frozen=True)
class Attached:
    """Result of an operation: a JSON value, and bytes that are sent as they are, those of all parts together."""

    value: Any
    parts: Sequence[Any]


class Confined:
    """Child process that runs the operations of a module, started at the first call; another one if it was ended.

    module: name of the module. arguments: JSON values for its `operations`. seconds, megabytes: of processor time and
    memory in which it returns; the module's imports do not count.
    """

    def __init__(self, module: str, *arguments: Any, seconds: float, megabytes: float):
        self.module, self.arguments, self.limits = module, arguments, (seconds, megabytes)
        self.lock = threading.RLock()
        self.child: Child | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return made, (self.module, self.arguments, *self.limits)  # a copy, also in another process, has its own child

    def start(self) -> None:
        """Start the child, if there is none; raises ValueError as `call`."""
        with self.lock:
            if self.child is None or not self.child.usable():
                self.child = Child()
                self.ask("", [self.module, *self.arguments], *self.limits)

    def call(self, name: str, *arguments: Any, seconds: float, megabytes: float) -> Any:
        """Result of an operation; of one that attaches bytes a pair, the value and the bytes.

        seconds: of processor time; megabytes: that the child may take besides what it has.

        Raises ValueError, without a subject, if the operation raises anything, takes more, or ends the process.
        """
        with self.lock:
            self.start()
            return self.ask(name, arguments, seconds, megabytes)

    def interrupt(self) -> None:
        """End the child, also while another thread waits for it, where `call` raises KeyboardInterrupt."""
        child = self.child
        if child is not None and child.usable():
            child.interrupted = True
            child.process.kill()

    def close(self) -> None:
        """End the child; the next call starts another one."""
        with self.lock:
            if self.child is not None:
                self.child.finalizer()

    def ask(self, name: str, arguments: Any, seconds: float, megabytes: float) -> Any:
        """Send a request and wait for the reply."""
        child = self.child
        assert child is not None
        try:
            found = child.exchange(json.dumps([name, arguments, seconds, megabytes]).encode())
            if found is not None:
                reply, attached = found
                if "value" in reply:
                    return (reply["value"], attached) if "attached" in reply else reply["value"]
                why = reply.get("error")
            else:
                code = child.exit_code()
                if child.interrupted:
                    raise KeyboardInterrupt
                why = {
                    -signal.SIGPROF: f"it takes more than {seconds:,.0f} s",
                    -signal.SIGALRM: f"it takes more than {WAITING * seconds:,.0f} s",
                    -signal.SIGABRT: f"it takes more than {megabytes:,.0f} MB, or aborts",  # Rust does without memory
                }.get(code, f"it ends its process with code {code}")
        except BaseException:
            child.finalizer()
            raise
        if not name:
            child.finalizer()
        raise ValueError(why or f"it takes more than {megabytes:,.0f} MB")


def made(module: str, arguments: tuple[Any, ...], seconds: float, megabytes: float) -> Confined:
    return Confined(module, *arguments, seconds=seconds, megabytes=megabytes)


class Child:
    """The process. It is ended with its object, and ends by itself if this process is killed."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        # A session of its own: Ctrl-C and SIGTERM for a group are this process's affair, which may go on for a while.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=pipe,
            stdout=pipe,
            stderr=null,
            env=environment,
            start_new_session=True,
        )
        self.owner, self.interrupted = os.getpid(), False
        self.finalizer = weakref.finalize(self, end, self.process, self.owner)

    def usable(self) -> bool:
        """True if the process runs, and is a child of this one: a fork shares its pipes."""
        return self.owner == os.getpid() and self.process.poll() is None

    def exchange(self, request: bytes) -> tuple[dict[str, Any], bytes] | None:
        """Reply to a request, each a line, and the bytes that follow it; None if the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(request + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            return None
        if not line.endswith(b"\n"):
            return None
        reply = json.loads(line)
        attached = self.process.stdout.read(reply.get("attached", 0))
        return (reply, attached) if len(attached) == reply.get("attached", 0) else None

    def exit_code(self) -> int:
        """Exit code of the process, which has closed its output."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.finalizer()
        return self.process.returncode


def end(process: "subprocess.Popen[bytes]", owner: int) -> None:
    """End a child of this process, unless this is a fork of its parent."""
    if owner != os.getpid():
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what was not written yet
            if pipe is not None:
                pipe.close()


def main() -> None:
    """Answer requests until standard input ends: the child's side."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # the null device
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF, signal.SIGALRM})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    operations: dict[str, Any] = {}
    parts: Sequence[Any] = ()
    for line in sys.stdin.buffer:
        name, arguments, seconds, megabytes = json.loads(line)
        del line
        if not name:
            module = importlib.import_module(arguments[0])
        try:
            with limited(seconds, megabytes):
                if name:
                    value = operations[name](*arguments)
                else:
                    operations, value = module.operations(*arguments[1:]), None
                if isinstance(value, Attached):
                    value, parts = value.value, value.parts
                    reply = json.dumps({"value": value, "attached": sum(map(len, parts))}).encode()
                else:
                    reply = json.dumps({"value": value}).encode()
        except MemoryError:
            reply = json.dumps({"error": None}).encode()
        except BaseException as error:  # a panic of Rust is no Exception
            reply = json.dumps({"error": described(error)}).encode()
        replies.writelines([reply, b"\n", *parts])
        replies.flush()
        parts = ()


def described(error: BaseException) -> str:
    """Beginning of an error's message, or its class."""
    return shortened(str(error).strip().partition("\n")[0], 300) or type(error).__name__


@contextlib.contextmanager
def limited(seconds: float, megabytes: float) -> Iterator[None]:
    """Context in which this process is ended after some time; what asks for more memory fails.

    Time is that of the processor, so that a busy machine does not matter, but for an operation that waits for ever.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    size = data_bytes()
    if size is not None:
        most = size + int(megabytes * 1e6)
        resource.setrlimit(resource.RLIMIT_DATA, (most if before[1] < 0 else min(most, before[1]), before[1]))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, WAITING * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_DATA, before)


def data_bytes() -> int | None:
    """Bytes of this process's data and anonymous memory; None where the operating system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData")), None)


if __name__ == "__main__":
    # The module under its own name, whose `Attached` is that of the operations.
    importlib.import_module("jaxmodels.process.confined").main()
