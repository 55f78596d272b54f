"""`python -m parity.mutations`: the share of planted mistakes that the harness finds and names."""

import sys

from parity.mutation.score import main

if __name__ == "__main__":
    sys.exit(main())
