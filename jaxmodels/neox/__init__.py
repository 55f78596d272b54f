"""GPT-NeoX and Pythia (arXiv 2204.06745, 2304.01373)."""

from jaxmodels.neox.config import PRESETS, NeoXConfig
from jaxmodels.neox.int8 import quantize
from jaxmodels.neox.model import NeoX

__all__ = ["PRESETS", "NeoX", "NeoXConfig", "quantize"]
