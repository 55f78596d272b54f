"""`python -m train.sample`: text written by a trained run; see `jaxmodels.training.sample`."""

import sys

from jaxmodels.training.sample import PROGRAM, main
from jaxmodels.training.signals import one_line_errors

if __name__ == "__main__":
    with one_line_errors(PROGRAM):
        main(sys.argv[1:])
