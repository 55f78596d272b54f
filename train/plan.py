"""`python -m train.plan`: memory and time of a training step on a TPU slice; see `jaxmodels.training.plan`."""

import sys

from jaxmodels.training.plan.command import main

if __name__ == "__main__":
    sys.exit(main())
