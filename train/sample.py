"""`python -m train.sample`: text from a trained run; see `jaxmodels.training.commands.sample`."""

import sys

from jaxmodels.training.commands.sample import main

if __name__ == "__main__":
    sys.exit(main())
