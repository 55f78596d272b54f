"""Planning a training step for a TPU topology: memory, FLOPs and communication of the compiled program."""
