"""PyTorch models in JAX, with proof that the numbers agree."""
