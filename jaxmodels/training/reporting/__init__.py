"""What a run shows and records: progress, metrics.jsonl, TensorBoard, Weights & Biases, callbacks, profiles."""
