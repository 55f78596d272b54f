"""Checkpoints of GPT-NeoX's own format, in shards of any model-parallel degree."""

from jaxmodels.convert.neox.read import load_neox
from jaxmodels.convert.neox.write import save_neox

__all__ = ["load_neox", "save_neox"]
