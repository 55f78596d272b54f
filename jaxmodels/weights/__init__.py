"""PyTorch names and Flax arrays: matching them, reading them lazily, placing them on devices. Knows no model."""
