"""Benchmarks of `jaxmodels.generate`."""
