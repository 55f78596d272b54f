"""Checkpoints as sides of a comparison: opened, loaded into the PyTorch twin, and verified from the command line."""
