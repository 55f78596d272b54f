"""`python -m jaxmodels.retro.neighbors`: print the passages of a chunk index that are nearest to a text."""

import sys

from jaxmodels.command import call

if __name__ == "__main__":
    sys.exit(call("neighbors", sys.argv[1:], "python -m jaxmodels.retro.neighbors"))
