"""Measurements, each a ratio against something timed in the same run. None of them is a test."""
