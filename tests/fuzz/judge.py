"""One attempt: a changed copy of an example is read, and what happens is judged.

Allowed is that the reader returns, or raises a ValueError, or an OSError, that names a file. It must not write, run or
connect to anything, use much time or memory, or print control characters.
"""

import contextlib
import dataclasses
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.guard import Guard, differing, listing
from tests.fuzz.mutations import mutate
from tests.fuzz.mutations.values import CANARY, hatch, sings
from tests.fuzz.targets.kind import Target

SECONDS = 5.0
BYTES = 1e9
LONGEST = 6_000  # characters of an error: about a page, and the names of files
PRINTED = 200_000  # bytes that a reader may print
PROJECT = ("/jaxmodels/", "/parity/", "/train/")
SUBJECT = "subject"  # name of the folder that is read


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of an attempt. what: None if all is well. signature: equal for findings with one cause, mostly."""

    what: str | None = None
    signature: str = ""
    refused: bool = False


class Judge:
    """Makes attempts in a folder of its own; one a process."""

    def __init__(self, box: Path):
        self.box, self.guard = box, Guard()
        box.mkdir(parents=True, exist_ok=True)
        self.capture = os.open(box.with_name(f"{box.name}.output"), os.O_RDWR | os.O_CREAT | os.O_TRUNC)

    def prepare(self, target: Target, template: Path, *, valid: bool = True) -> None:
        """Make the example if there is none, and if it is valid read it once; raises what the reader raises."""
        if not template.exists():
            new = template.with_name(f"{template.name}.{os.getpid()}")
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            target.make(new)
            with contextlib.suppress(OSError):  # another process was faster
                new.rename(template)
        if not valid:
            return
        self.copy(template)
        with self.captured() as read_output:
            codes = target.read(self.box / SUBJECT)
        if isinstance(codes, list) and any(code != 0 for code in codes if isinstance(code, int)):
            raise RuntimeError(f"{target.name}: exit codes {codes}: {read_output()!r:.2000}")

    def copy(self, template: Path) -> None:
        """Fresh copy of an example, with folders beside it that nothing may change."""
        shutil.rmtree(self.box, ignore_errors=True)
        shutil.copytree(template, self.box / SUBJECT, symlinks=True)
        (self.box / "beside").mkdir()
        (self.box / "beside" / "secret.txt").write_text('{"secret": 1}\n')
        shutil.copytree(template, self.box / "beside" / "folder", symlinks=True)
        (self.box / "out").mkdir()

    def attempt(self, target: Target, template: Path, seed: int) -> Outcome:
        """Change a copy of the example by a seed and read it."""
        self.copy(template)
        subject, rng = self.box / SUBJECT, np.random.default_rng(seed)
        if target.build is not None:
            target.build(subject, rng)
        else:
            mutate(subject, target.files, rng)
        if target.seal is not None and rng.random() < 0.8:
            with self.captured(), contextlib.suppress(Exception):
                target.seal(subject)
        return self.judged(target, subject)

    def judged(self, target: Target, subject: Path) -> Outcome:
        """Read a folder and judge what happens."""
        before = listing(self.box)
        hatch()
        peak_reset()
        resident, began, worked = memory("VmRSS"), time.monotonic(), time.process_time()
        refused: BaseException | None = None
        allowed = self.box if target.changes else self.box / "out"
        with self.captured() as read_output, self.guard.watching(allowed, kept=self.box / "beside") as events:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(BYTES), hard))  # a terabyte of zeros might be copied
            temporary, tempfile.tempdir = tempfile.tempdir, str(self.box / "out")  # a text's ids go to such files
            try:
                target.read(subject)
            except BaseException as error:
                refused = error
            finally:
                tempfile.tempdir = temporary
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        seconds = min(time.monotonic() - began, time.process_time() - worked)
        used = memory("VmHWM") - resident
        output = read_output()
        if refused is not None:
            problem = error_problem(refused, self.box)
            if problem is not None:
                return problem
        if events:
            return Outcome("; ".join(events[:5]), f"event {events[0].partition(' ')[0]}", True)
        names = [name for name in differing(before, listing(self.box)) if not name.startswith("out/")]
        names = [name for name in names if not (target.changes and name.startswith((SUBJECT, f".{SUBJECT}.")))]
        if names:
            return Outcome(f"changed {names[:5]}", "changed files")
        if not sings():
            return Outcome(f"changed or removed {CANARY}", "changed files")
        if odd := control_characters(output):
            return Outcome(f"printed {odd!r}: {output[:500]!r}", "printed control characters")
        if b"Traceback (most recent" in output:
            return Outcome(f"printed a traceback: {output[:1500]!r}", "printed a traceback")
        if len(output) > PRINTED:
            return Outcome(f"printed {len(output)} bytes: {output[:300]!r}", "printed much")
        place = "" if refused is None else place_of(refused)
        if seconds > SECONDS:
            return Outcome(f"{seconds:.1f} s; {refused!r:.300}", f"slow {place}")
        if used > BYTES:
            return Outcome(f"{used / 1e9:.1f} GB; {refused!r:.300}", f"memory {place}")
        return Outcome(refused=refused is not None)

    @contextlib.contextmanager
    def captured(self) -> Iterator[Any]:
        """Context in which standard output and error are written to a file; yields a function that reads it."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.ftruncate(self.capture, 0)
        os.lseek(self.capture, 0, os.SEEK_SET)
        kept = [os.dup(number) for number in (1, 2)]
        for number in (1, 2):
            os.dup2(self.capture, number)
        try:
            yield lambda: os.pread(self.capture, PRINTED + 1, 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, saved in zip((1, 2), kept, strict=True):
                os.dup2(saved, number)
                os.close(saved)


def error_problem(error: BaseException, box: Path) -> Outcome | None:
    """Reason why an exception is a finding; None if it is none."""
    text = str(error)
    if not isinstance(error, ValueError | OSError):
        lines = "".join(traceback.format_exception(error, limit=-8))
        return Outcome(lines[-3000:], f"{type(error).__name__} {place_of(error)}")
    if len(text) > LONGEST:
        return Outcome(f"error of {len(text)} characters: {text[:300]}…", f"long error {place_of(error)}")
    if "\n" in text or "\r" in text:
        return Outcome(f"error of several lines: {text[:1000]}", f"several lines {place_of(error)}")
    if "weights_only=False" in text:
        return Outcome(f"advice to run the file's code: {text}", f"advice {place_of(error)}")
    named = {os.path.basename(path) for path in listing(box)} | {str(box)}
    if not any(name in text for name in named if name != "beside"):
        lines = "".join(traceback.format_exception(error, limit=-4))
        return Outcome(f"names no file: {lines[-1500:]}", f"unnamed {type(error).__name__} {place_of(error)}")
    return None


def place_of(error: BaseException) -> str:
    """Function and line of the project in which an exception was raised."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if any(part in f.filename for part in PROJECT)]
    frames = [f for f in frames if "/site-packages/" not in f.filename]
    return f"{'/'.join(Path(frames[-1].filename).parts[-3:])}:{frames[-1].lineno}" if frames else "elsewhere"


def control_characters(output: bytes) -> str:
    """Characters that a terminal would act on, except for newlines and tabs."""
    text = output.decode("utf-8", "replace")
    return "".join(sorted({c for c in text if not c.isprintable() and c not in "\n\t\r"}))[:50]


def peak_reset() -> None:
    """Let the kernel count the peak of resident memory anew."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def memory(name: str, process: int | str = "self") -> int:
    """Resident memory of a process in bytes: now (VmRSS), or its peak (VmHWM)."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)
