"""Compiled products of float32 rows with weights of 16, 8, 4 and 32 bits, for CPUs; without them XLA computes them.

XLA's own products of narrow weights on a CPU take up to 20 times as long as those of float32, and those of some
hundred rows in float32 are slower than a processor with AVX-512 allows. The source is
`products.cc`; it is compiled on first use, by `build`.
"""

from jaxmodels.native.groups import packed, padded, unpacked
from jaxmodels.native.products import NARROW, available, product, wide_product

__all__ = ["NARROW", "available", "packed", "padded", "product", "unpacked", "wide_product"]
