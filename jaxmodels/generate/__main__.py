"""`python -m jaxmodels.generate`: see `jaxmodels.generate.command`."""

import sys

from jaxmodels.generate.command import main

if __name__ == "__main__":
    sys.exit(main())
