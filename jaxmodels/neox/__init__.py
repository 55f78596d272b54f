"""GPT-NeoX and Pythia (arXiv 2204.06745, 2304.01373)."""

from jaxmodels.neox.config import NeoXConfig
from jaxmodels.neox.model import NeoX, quantize

__all__ = ["NeoX", "NeoXConfig", "quantize"]
