"""Figures of the pages, drawn from arrays of the code; `python -m docs.figures` draws all of them."""
