"""Reading and writing files: atomic writes, safetensors, `.pt` files, checkpoints of arrays. Knows no model."""
