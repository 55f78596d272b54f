"""Process that makes attempts: reads {"target": …, "seed": …} a line, writes {"what": …, …} a line.

A reader may hang, swell or crash: `tests.fuzz.workers` watches this process and replaces it.
"""

import dataclasses
import faulthandler
import json
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")


def main(folder: Path) -> None:
    """Answer requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ["TMPDIR"] = str(folder)  # of this run alone: another one may have a reader that removes its canary
    from tests.fuzz.judge import Judge
    from tests.fuzz.targets import TARGETS, faulty

    targets = TARGETS | faulty.TARGETS

    box = folder / f"box-{os.getpid()}"
    judge = Judge(box)
    faulthandler.enable(judge.capture)
    faulthandler.register(signal.SIGUSR1, judge.capture, all_threads=False)
    prepared: set[str] = set()
    for line in sys.stdin:
        request = json.loads(line)
        target = targets[request["target"]]
        template = folder / "templates" / target.name.replace(" ", "-").replace("'", "").replace(",", "")
        if target.name not in prepared:
            judge.prepare(target, template, valid=target.name in TARGETS)
            prepared.add(target.name)
        if request.get("seed") is None:
            reply = {}
        else:
            reply = dataclasses.asdict(judge.attempt(target, template, request["seed"]))
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
