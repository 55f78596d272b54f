"""Golden fixtures: PyTorch's results, recorded once and replayed without torch."""
