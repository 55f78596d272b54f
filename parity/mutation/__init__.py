"""Planted mistakes, and the share of them that the harness finds and names."""
