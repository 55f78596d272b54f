"""Benchmarks. Each reports ratios to something timed in the same run. They are not tests."""
