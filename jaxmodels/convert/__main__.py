"""`python -m jaxmodels.convert`."""

import os
import sys

from jaxmodels.convert.command import main

if __name__ == "__main__":
    import jax

    from jaxmodels.allocator import keep_freed_memory

    keep_freed_memory()
    # Nothing here needs an accelerator, which another process may hold.
    jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
    sys.exit(main())
