"""Readings of a comparison: differences and their limits."""
