"""`python -m train.tokenize`: a text as tokens, which training maps into memory; see `jaxmodels.training.tokenize`."""

import sys

from jaxmodels.training.tokenize import main

if __name__ == "__main__":
    sys.exit(main())
