"""The systems in plain PyTorch: references for the Flax twins in `jaxmodels`.

Clarity before speed: no fused kernels, no custom autograd, one score matrix per attention. Attribute names are the
originals', so a checkpoint trained with them loads as it is.
"""
