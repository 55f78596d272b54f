"""`python -m train.plot`: loss curves of runs as a PNG file; see `jaxmodels.training.commands.plot`."""

import sys

from jaxmodels.training.commands.plot import main

if __name__ == "__main__":
    sys.exit(main())
