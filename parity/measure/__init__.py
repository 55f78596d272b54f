"""Readings of a comparison: differences, and the limits that they are held to."""
