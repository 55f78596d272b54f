"""Training: one script per experiment, over one loop."""
