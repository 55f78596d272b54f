"""`python -m train.evaluate`: how well a trained model predicts a text; see `jaxmodels.training.evaluate`."""

import sys

from jaxmodels.training.evaluate import PROGRAM, main
from jaxmodels.training.signals import one_line_errors

if __name__ == "__main__":
    with one_line_errors(PROGRAM):
        main(sys.argv[1:])
