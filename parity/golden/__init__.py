"""Golden fixtures: results of PyTorch that are recorded once and replayed without it."""
