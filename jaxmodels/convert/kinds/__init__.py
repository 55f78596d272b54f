"""Kinds of checkpoint folders, told apart by their content, without reading weights."""

from jaxmodels.convert.kinds.find import NAMES, Kind, Place, find, run_above
from jaxmodels.convert.kinds.unusable import check_weights

__all__ = ["NAMES", "Kind", "Place", "check_weights", "find", "run_above"]
