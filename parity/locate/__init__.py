"""Locate the sub-module in which two models differ."""
