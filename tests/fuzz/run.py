"""`python -m tests.fuzz`: read changed files for a time; anything but a ValueError or an OSError is a finding.

Each file is read in at most SECONDS and BYTES of memory. A finding names target and seed, and can be repeated:
`python -m tests.fuzz "chunk index" --seed 1234`.
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import numpy as np

from jaxmodels.process.texts import shortened, visible
from tests.fuzz.mutate import copied, mutate
from tests.fuzz.targets import TARGETS, Target

SECONDS = 5.0
BYTES = 1e9
LONGEST = 4_000  # characters of an error


class TooSlow(BaseException):
    """Raised by the alarm; not an Exception, so that no reader catches it."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """A file that was not read as it should be."""

    target: str
    seed: int
    what: str


def resident() -> int:
    """Bytes of memory that this process uses."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TooSlow in a block that takes longer."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak_reset() -> None:
    """Let the kernel count the peak of resident memory anew."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Largest resident memory since `peak_reset`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def attempt(target: Target, template: Path, folder: Path, seed: int) -> Finding | None:
    """Change a copy of the template by a seed and read it; a Finding if it is not read as it should be."""
    copied(template, folder)
    mutate(folder, target.files, np.random.default_rng(seed))
    peak_reset()
    before, began = resident(), time.monotonic()
    try:
        with limited(4 * SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(folder)
    except (ValueError, OSError) as error:
        if len(str(error)) > LONGEST:
            return Finding(target.name, seed, f"error of {len(str(error))} characters: {str(error)[:200]}…")
        if "weights_only=False" in str(error):
            return Finding(target.name, seed, f"advice to run the file's code: {error}")
    except TooSlow:
        return Finding(target.name, seed, f"more than {4 * SECONDS:.0f} s")
    except Exception:
        return Finding(target.name, seed, traceback.format_exc(limit=-6))
    seconds, used = time.monotonic() - began, peak() - before
    if seconds > SECONDS:
        return Finding(target.name, seed, f"{seconds:.1f} s")
    if used > BYTES:
        return Finding(target.name, seed, f"{used / 1e9:.1f} GB")
    return None


def fuzz(target: Target, seeds: range, seconds: float, folder: Path) -> Iterator[tuple[int, Finding | None]]:
    """Attempts of a target, until its seeds or seconds are used up."""
    template, began = folder / "template", time.monotonic()
    template.mkdir(parents=True)
    target.make(template)
    target.read(template)  # the example is valid
    for seed in seeds:
        if time.monotonic() - began > seconds:
            return
        yield seed, attempt(target, template, folder / "copy", seed)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=str(__doc__).partition("\n\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default: all of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=float, default=600.0, help="time for all targets together (default: 600)")
    parser.add_argument("--first", type=int, default=0, help="first seed (default: 0)")
    parser.add_argument("--seed", type=int, help="try one seed and print the whole error")
    options = parser.parse_args(argv)
    faulthandler.enable()  # the seed of a crash in C is printed before each attempt
    names = options.targets or list(TARGETS)
    unknown = [name for name in names if name not in TARGETS]
    if unknown:
        parser.error(f"TARGET {unknown[0]!r} must be one of {', '.join(TARGETS)}")
    findings: list[Finding] = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            seeds = range(options.first, 10**9) if options.seed is None else range(options.seed, options.seed + 1)
            count = 0
            for seed, finding in fuzz(TARGETS[name], seeds, options.seconds / len(names), Path(folder)):
                count += 1
                if finding:
                    findings.append(finding)
                    print(f"FINDING {name}, seed {seed}: {visible(shortened(finding.what), keep=chr(10))}", flush=True)
        print(f"{name}: {count} files, {sum(f.target == name for f in findings)} findings", flush=True)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
