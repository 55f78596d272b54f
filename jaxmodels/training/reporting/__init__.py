"""Output and records of a run: progress, metrics.jsonl, TensorBoard, Weights & Biases, callbacks, profiles."""
