"""Compiled products of float32 rows with weights in 16 and 8 bits, for CPUs; XLA computes them where it cannot be used.

XLA's own products of such weights on a CPU take up to 20 times as long as those of float32. The source is
`products.cc`; it is compiled on first use, by `build`.
"""

from jaxmodels.native.products import NARROW, available, product

__all__ = ["NARROW", "available", "product"]
