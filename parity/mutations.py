"""`python -m parity.mutations`: how many planted mistakes the harness finds and names."""

import sys

from parity.mutation.mutate import main

if __name__ == "__main__":
    sys.exit(main())
