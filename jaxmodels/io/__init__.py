"""Reading and writing files: atomic writes, limits, checkpoints of arrays; `formats` has those of numbers. Knows no model."""
