"""A child process that makes attempts, watched from outside: for time, memory and crashes."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.fuzz.judge import BYTES, memory

DEADLINE = 20.0  # seconds of work, or of waiting for nothing, after which a reader hangs
STARTING = 300.0  # seconds to import, make an example and read it
CROWDED = 3e9  # resident bytes after which a process is replaced: compiled programs stay in JAX's caches
ROOT = Path(__file__).resolve().parents[2]


class Worker:
    """Child process, started when it is needed."""

    def __init__(self, folder: Path, deadline: float = DEADLINE):
        self.folder, self.deadline = folder, deadline
        self.process: subprocess.Popen[bytes] | None = None
        self.ready: set[str] = set()

    def attempt(self, target: str, seed: int) -> dict[str, Any]:
        """Outcome of an attempt as a mapping; raises RuntimeError if the example itself cannot be read."""
        if target not in self.ready:
            found = self.ask({"target": target}, STARTING)
            if found.get("what"):
                raise RuntimeError(f"the example of {target!r} is not read: {found['what']}")
            self.ready.add(target)
        found = self.ask({"target": target, "seed": seed}, self.deadline)
        if self.process is not None and memory("VmRSS", self.process.pid) > CROWDED:
            self.close()
        return found

    def ask(self, request: dict[str, Any], deadline: float) -> dict[str, Any]:
        """Reply of the child; what ended it, if it ends or has to be ended."""
        process = self.running()
        assert process.stdin is not None
        assert process.stdout is not None
        before, clock = memory("VmRSS", process.pid), Clock(process.pid)
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        while True:
            if select.select([process.stdout], [], [], 0.02)[0]:
                line = process.stdout.readline()
                if line:
                    return dict(json.loads(line))
                process.wait()
                return self.ended(f"ended the process with code {process.returncode}", "crash")
            if deadline != STARTING and memory("VmRSS", process.pid) - before > 1.5 * BYTES:
                return self.ended(f"more than {1.5 * BYTES / 1e9:.1f} GB", "memory")
            if clock.seconds() > deadline:
                return self.ended(f"more than {deadline:.0f} s", "hang")

    def ended(self, what: str, kind: str) -> dict[str, Any]:
        """Finding for a process that has ended or is ended now, with the Python frames it was in."""
        process = self.running()
        if process.poll() is None:
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.5)
        output = self.folder / f"box-{process.pid}.output"
        frames = output.read_bytes()[-4000:].decode("utf-8", "replace") if output.exists() else ""
        self.close()
        return {"what": f"{what}\n{frames}", "signature": f"{kind} {place_in(frames)}", "refused": False}

    def running(self) -> "subprocess.Popen[bytes]":
        """The child, started if there is none."""
        if self.process is None:
            environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
            environment |= {"HF_HUB_OFFLINE": "1", "MPLCONFIGDIR": str(self.folder)}
            command = [sys.executable, "-m", "tests.fuzz.child", str(self.folder)]
            pipe = subprocess.PIPE
            with (self.folder / "errors.txt").open("ab") as errors:  # of threads that go on after an attempt
                self.process = subprocess.Popen(
                    command, stdin=pipe, stdout=pipe, stderr=errors, env=environment, cwd=ROOT, start_new_session=True
                )
            self.ready = set()
        return self.process

    def close(self) -> None:
        """End the child."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):
                    assert stream is not None
                    stream.close()
            self.process, self.ready = None, set()


class Clock:
    """Time that a process has worked or waited, without the time in which a busy machine gave it no processor."""

    def __init__(self, process: int):
        self.tasks = Path(f"/proc/{process}/task")
        self.waited, self.asked = 0.0, time.monotonic()
        self.began, _ = self.work()
        self.worked = self.began

    def seconds(self) -> float:
        """Seconds since the clock was made; is called often."""
        worked, runnable = self.work()
        now = time.monotonic()
        if not runnable and worked == self.worked:
            self.waited += now - self.asked
        self.worked, self.asked = worked, now
        return self.waited + self.worked - self.began

    def work(self) -> tuple[float, bool]:
        """Processor time of all threads in seconds, and whether one of them would run if it could."""
        ticks, runnable = 0, False
        for file in self.tasks.glob("*/stat"):
            with contextlib.suppress(OSError):  # the thread has ended
                fields = file.read_text().rpartition(")")[2].split()
                ticks, runnable = ticks + int(fields[11]) + int(fields[12]), runnable or fields[0] == "R"
        return ticks / os.sysconf("SC_CLK_TCK"), runnable


def place_in(frames: str) -> str:
    """First frame of the project in the output of faulthandler."""
    for line in frames.splitlines():
        if line.startswith("  File") and any(part in line for part in ("/jaxmodels/", "/parity/")):
            _, path, rest = line.split('"', 2)
            return f"{'/'.join(Path(path).parts[-3:])}:{rest.split()[2]}"
    return "elsewhere"
