"""`python -m train.plot`: loss curves of runs as a picture; see `jaxmodels.training.plot`."""

import sys

from jaxmodels.training.plot import PROGRAM, main
from jaxmodels.training.signals import one_line_errors

if __name__ == "__main__":
    with one_line_errors(PROGRAM):
        main(sys.argv[1:])
