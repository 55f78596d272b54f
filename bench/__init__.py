"""Benchmarks. Each reports ratios to something timed in the same run; none of them is a test."""
