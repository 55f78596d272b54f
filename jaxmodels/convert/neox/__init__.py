"""GPT-NeoX's own checkpoints, in shards of any model-parallel degree."""

from jaxmodels.convert.neox.read import InferredWarning, ReplicaDriftWarning, load_neox, open_neox
from jaxmodels.convert.neox.write import save_neox, write_neox

__all__ = ["InferredWarning", "ReplicaDriftWarning", "load_neox", "open_neox", "save_neox", "write_neox"]
