"""Tokenizers: files that others publish, what may be in them, and where a text can be cut."""
