"""Training scripts, one per experiment, and the commands over runs. Needs the extra `train`; run from a checkout."""

from jaxmodels.process.extras import require, running_command
from jaxmodels.process.programs import end_at_ctrl_c

if (command := running_command()) is not None:
    end_at_ctrl_c(command)

require("train", "grain", "optax", "orbax.checkpoint", "rich", "tyro")
