"""Propose names for a pair of models from the structure of both: `suggest`.

tree          both models as trees of named nodes
similarity    how alike two names are
layers        layers whose arrays are packed differently
matching      pair the trees
compression   write the pairs as few names
proposal      `suggest` itself
"""

from parity.compare.suggest.proposal import Suggestion, suggest

__all__ = ["Suggestion", "suggest"]
