"""`python -m jaxmodels.retro.neighbors`: the passages of a chunk index that are nearest to a text."""

import sys

from jaxmodels.retro.retrieval.command import main

if __name__ == "__main__":
    sys.exit(main())
