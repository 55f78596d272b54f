"""`python -m train.plan`: whether and how fast a training step would run on a TPU slice."""

import sys

from jaxmodels.training.plan.command import PROGRAM, main
from jaxmodels.training.signals import one_line_errors

if __name__ == "__main__":
    with one_line_errors(PROGRAM):
        main(sys.argv[1:])
