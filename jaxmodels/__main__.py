"""`python -m jaxmodels`."""

import sys

from jaxmodels.command import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m jaxmodels"))
