"""Golden fixtures: recorded PyTorch results, replayed without PyTorch."""
