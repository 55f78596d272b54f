"""`python -m jaxmodels.convert`."""

import sys

from jaxmodels.command import call

if __name__ == "__main__":
    sys.exit(call("convert", sys.argv[1:], "python -m jaxmodels.convert"))
