"""Files of numbers by format: NumPy, safetensors, PyTorch, and the arrays of Orbax."""
