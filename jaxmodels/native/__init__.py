"""Compiled products of float32 rows with weights in 16, 8 and 4 bits, for CPUs; without them XLA computes the products.

XLA's own products of such weights on a CPU take up to 20 times as long as those of float32. The source is
`products.cc`; it is compiled on first use, by `build`.
"""

from jaxmodels.native.groups import packed, padded, unpacked
from jaxmodels.native.products import NARROW, available, product, wide_product

__all__ = ["NARROW", "available", "packed", "padded", "product", "unpacked", "wide_product"]
