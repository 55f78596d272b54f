"""`make bench`: runs the commands of docs/bench.md and writes their output into the page.

A code block below a comment `<!-- python -m bench.rope --rounds 5 -->` is the output of that command, below a line with
commit and date. The page is written after each command, and a command that fails leaves its block as it is. Everything
takes about an hour; other programs should not run beside it.
"""

import argparse
import datetime
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from jaxmodels.io.atomic import atomic_file
from parity.report.stamp import commit

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "bench.md"
# Comment with a command, and the block below it.
BLOCK = re.compile(r"<!-- (?P<command>python -m bench\.[^\n]+?) -->\n```\n(?P<output>.*?)```\n", re.DOTALL)


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(prog="python -m bench.page", description=__doc__)
    add = arguments.add_argument
    add("--only", nargs="+", default=[""], metavar="TEXT", help="only commands that contain a TEXT")
    add("--page", type=Path, default=PAGE, metavar="FILE", help="page to write (default docs/bench.md)")
    add("--list", action="store_true", help="print the commands, and run none")
    return arguments.parse_args()


def commands(text: str) -> list[str]:
    """Commands of a page, in its order."""
    return [block["command"] for block in BLOCK.finditer(text)]


def with_output(text: str, command: str, output: str) -> str:
    """Page with the output of a command in its block."""

    def replaced(block: re.Match[str]) -> str:
        return f"<!-- {command} -->\n```\n{output}```\n" if block["command"] == command else block[0]

    return BLOCK.sub(replaced, text)


def run(command: str, version: str) -> str | None:
    """Standard output of a command below a line on the commit and the date; None if it fails."""
    words = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        print(f"{command} ended with code {done.returncode}; its block is as it was", file=sys.stderr)
        return None
    lines = [line.rstrip() for line in done.stdout.strip().splitlines()]
    return "\n".join([f"commit {version}, {datetime.date.today()}", *lines]) + "\n"


def main() -> int:
    options = parse()
    known = commands(options.page.read_text(encoding="utf-8"))
    chosen = [command for command in known if any(text in command for text in options.only)]
    if options.list:
        print("\n".join(chosen))
        return 0
    version, failed = commit(), 0  # before the page changes
    for i, command in enumerate(chosen):
        print(f"{i + 1} of {len(chosen)}: {command}", flush=True)
        began = time.monotonic()
        output = run(command, version)
        failed += output is None
        if output is not None:
            with atomic_file(options.page) as temporary:
                text = options.page.read_text(encoding="utf-8")
                temporary.write_text(with_output(text, command, output), encoding="utf-8")
        print(f"    {time.monotonic() - began:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
