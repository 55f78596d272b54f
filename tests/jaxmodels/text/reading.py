"""Program that reads a file of texts, and prints as JSON what all of its processes took: tests run it."""

import json
import resource
import sys
from pathlib import Path

from jaxmodels.text.tables.columns import columns, idle
from tests.fuzz.judge import memory


def cost(file: Path) -> dict[str, object]:
    """Number of texts, the error or null, seconds of processor time, and the largest memory in bytes."""
    rows, error = 0, None
    try:
        for _ in columns(file, file.suffix[1:], "text", 0):
            rows += 1
    except ValueError as found:
        error = str(found)
    while idle:
        idle.pop().close()
    own, children = (resource.getrusage(which) for which in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    seconds = sum(each.ru_utime + each.ru_stime for each in (own, children))
    # ru_maxrss of this process may be that of the one that started it.
    return {"rows": rows, "error": error, "seconds": seconds, "bytes": memory("VmHWM") + 1024 * children.ru_maxrss}


if __name__ == "__main__":
    print(json.dumps(cost(Path(sys.argv[1]))))
