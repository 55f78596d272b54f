"""`python -m train.tokenize`: encode a text once, to memory-mapped tokens; see `jaxmodels.training.tokenize`."""

import sys

from jaxmodels.training.tokenize import main

if __name__ == "__main__":
    sys.exit(main())
