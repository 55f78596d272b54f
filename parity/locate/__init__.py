"""Finding the sub-module that differs."""
