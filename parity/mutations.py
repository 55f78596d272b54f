"""`python -m parity.mutations`: measure the share of planted mistakes that the harness finds and names."""

import sys

from jaxmodels.process.extras import require
from jaxmodels.process.programs import run


def main() -> int:
    require("torch", "torch")
    require("golden", "rich")
    from parity.mutation import score

    return score.main()


if __name__ == "__main__":
    sys.exit(run(main, "python -m parity.mutations"))
