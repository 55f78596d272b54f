"""Training scripts, one per experiment, and the commands over runs. Needs the extra `train`; run from a checkout."""

from jaxmodels.process.extras import require

require("train", "grain", "optax", "orbax.checkpoint", "rich", "tyro")
