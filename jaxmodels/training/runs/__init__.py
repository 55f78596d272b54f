"""Folders of training runs: what they hold, and what one may ask for that others wrote."""
