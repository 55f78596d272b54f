"""`python -m train.evaluate`: loss of a trained model on a text; see `jaxmodels.training.commands.evaluate`."""

import sys

from jaxmodels.training.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
