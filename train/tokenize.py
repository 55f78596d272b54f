"""`python -m train.tokenize`: a text as tokens, for training to map into memory; see `jaxmodels.training.tokenize`."""

import sys

from jaxmodels.training.signals import one_line_errors
from jaxmodels.training.tokenize import PROGRAM, main

if __name__ == "__main__":
    with one_line_errors(PROGRAM):
        main(sys.argv[1:])
