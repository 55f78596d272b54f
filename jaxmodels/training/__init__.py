"""Training: the step, the loop, data, checkpoints, and the commands over runs."""
