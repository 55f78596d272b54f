"""Compiled products of matrices for CPUs: of float32, and of float32 rows with weights of 16, 8 and 4 bits.

XLA's own products of narrow weights on a CPU take up to 20 times as long as those of float32, and those of float32 are
slower than a processor with AVX-512 allows. Without the kernels XLA computes all. Their sources are compiled on first
use, by `build`.
"""

from jaxmodels.native.groups import packed, padded, unpacked
from jaxmodels.native.kernels import available
from jaxmodels.native.matmul import large_product, wide_product
from jaxmodels.native.products import NARROW, product

__all__ = ["NARROW", "available", "large_product", "packed", "padded", "product", "unpacked", "wide_product"]
