"""Reading and writing files: atomic writes, limits, checkpoints of arrays; `formats` has the kinds. Knows no model."""
