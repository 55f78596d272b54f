"""Training: the step, the loop, data, checkpoints, and the commands over runs. Needs the extra `train`."""

from jaxmodels.process.extras import require

require("train", "filelock", "grain", "optax", "orbax.checkpoint", "rich", "tyro")
