"""`python -m tests.fuzz`: read changed files for a time; report what readers should not do.

A finding is saved with target and seed in FOLDER/findings.jsonl and can be repeated by the printed line. The next run
goes on with the seeds that follow, per target, until FOLDER is deleted.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from jaxmodels.process.texts import visible
from tests.fuzz.targets import TARGETS
from tests.fuzz.workers import Worker

TURN = 2.0  # seconds of a target before the next one's turn
EVERY = 30.0  # seconds between progress lines, if standard error is no terminal
SHOWN = 3  # findings of one signature that are printed


class Campaign:
    """Seeds and findings of all targets; shared by the threads that ask the workers."""

    def __init__(self, names: list[str], folder: Path, first: int | None, count: int | None, minutes: float):
        self.names, self.folder, self.count = names, folder, count
        self.file = folder / "state.json"
        saved = json.loads(self.file.read_text()) if self.file.is_file() and first is None else {}
        self.next = {name: int(saved.get(name, first or 0)) for name in TARGETS}
        self.given: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.findings: Counter[str] = Counter()
        self.signatures: Counter[str] = Counter()
        self.turn, self.lock = 0, threading.Lock()
        self.began, self.shown, self.ends = time.monotonic(), 0.0, time.monotonic() + 60 * minutes
        self.keeps = first is None

    def turns(self) -> Iterator[Iterator[tuple[str, int]]]:
        """Targets in turn, each with the inputs of a turn as pairs of target and seed, until the time is over."""
        while time.monotonic() < self.ends:
            with self.lock:
                left = [name for name in self.names if self.count is None or self.given[name] < self.count]
                self.turn += 1
            if not left:
                return
            yield self.seeds(left[self.turn % len(left)])

    def seeds(self, name: str) -> Iterator[tuple[str, int]]:
        """Pairs of a target and its next seeds."""
        until = min(self.ends, time.monotonic() + TURN)
        while time.monotonic() < until:
            with self.lock:
                if self.count is not None and self.given[name] >= self.count:
                    return
                self.given[name] += 1
                self.next[name] += 1
                seed = self.next[name] - 1
            yield name, seed

    def take(self, name: str, seed: int, found: dict[str, Any]) -> None:
        """Count an outcome; save and print a finding."""
        with self.lock:
            self.done[name] += 1
            self.refused[name] += bool(found["refused"])
            if found["what"] is not None:
                self.report(name, seed, found)
            self.progress()

    def report(self, name: str, seed: int, found: dict[str, Any]) -> None:
        """Save and print a finding."""
        self.findings[name] += 1
        self.signatures[found["signature"]] += 1
        repeat = f'python -m tests.fuzz --target "{name}" --seed {seed} --count 1'
        with (self.folder / "findings.jsonl").open("a", encoding="utf-8") as saved:
            print(json.dumps({"target": name, "seed": seed, **found, "repeat": repeat}), file=saved)
        if self.signatures[found["signature"]] <= SHOWN:
            what = visible(found["what"][:4_000], keep="\n")
            print(f"\nFINDING in {name!r}: {found['signature']}\n{what}\n{repeat}", flush=True)

    def progress(self) -> None:
        """Print the progress line, if it is due."""
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if now - self.shown < (0.5 if terminal else EVERY):
            return
        self.shown = now
        left = max(0.0, self.ends - now) / 60
        n, found = sum(self.done.values()), sum(self.findings.values())
        line = f"{n:,} inputs, {n / (now - self.began):.1f} a second; {found} findings; {left:.1f} minutes left"
        print(f"\r\x1b[K{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)
        self.save()

    def save(self) -> None:
        """Save where the next run begins."""
        if self.keeps:
            self.file.write_text(json.dumps(self.next, indent=1) + "\n")

    def table(self, out: TextIO) -> None:
        """Print inputs and findings of each target."""
        width = max(map(len, self.names))
        print(f"\n{'target':{width}}  inputs  refused  findings", file=out)
        for name in self.names:
            print(f"{name:{width}} {self.done[name]:7,} {self.refused[name]:8,} {self.findings[name]:9,}", file=out)
        total = [sum(counts.values()) for counts in (self.done, self.refused, self.findings)]
        print(f"{'total':{width}} {total[0]:7,} {total[1]:8,} {total[2]:9,}", file=out)
        for signature, times in self.signatures.most_common():
            print(f"{times:5}  {visible(signature)}", file=out)


def work(campaign: Campaign, folder: Path) -> None:
    """Make attempts until the campaign is over."""
    worker = Worker(folder)
    try:
        for turn in campaign.turns():
            for name, seed in turn:
                campaign.take(name, seed, worker.attempt(name, seed))
    finally:
        worker.close()


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 1 if there are findings, 2 if an example cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=str(__doc__).partition("\n\n")[0])
    parser.add_argument("--target", action="append", metavar="NAME", help="target, may be repeated (default: all)")
    parser.add_argument("--minutes", type=float, default=60.0, help="time for all targets together (default: 60)")
    parser.add_argument("--seed", type=int, help="first seed of each target (default: where the last run ended)")
    parser.add_argument("--count", type=int, help="inputs of each target (default: as many as the time allows)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--folder", type=Path, default=Path("runs/fuzz"), help="findings (default: runs/fuzz)")
    parser.add_argument("--list", action="store_true", help="print the targets")
    options = parser.parse_args(argv)
    names = options.target or list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"--target {unknown[0]!r} must be one of {', '.join(TARGETS)}")
    if options.list:
        print("\n".join(names))
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(names, options.folder, options.seed, options.count, options.minutes)
    failed: list[BaseException] = []

    def guarded(folder: Path) -> None:
        try:
            work(campaign, folder)
        except RuntimeError as error:
            failed.append(error)
            campaign.ends = 0.0

    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # several times as fast as a disk
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory, ignore_cleanup_errors=True) as folder:
        threads = [threading.Thread(target=guarded, args=(Path(folder),)) for _ in range(options.jobs)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            campaign.ends = 0.0
            for thread in threads:
                thread.join()
    campaign.save()
    campaign.table(sys.stdout)
    if failed:
        print(f"python -m tests.fuzz: {failed[0]}", file=sys.stderr)
        return 2
    return 1 if campaign.findings.total() else 0
