"""`python -m tests.fuzz`; see `tests.fuzz.run`."""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.fuzz.run import main

if __name__ == "__main__":
    sys.exit(main())
