"""Readings of a pair: differences and their limits."""
