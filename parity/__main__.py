"""`python -m parity`."""

import sys

from parity.command import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m parity"))
