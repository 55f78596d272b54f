"""Kinds of checkpoint folders, told apart by their content, without reading weights."""

from jaxmodels.convert.kinds.find import NAMES, Kind, Place, find, run_above

__all__ = ["NAMES", "Kind", "Place", "find", "run_above"]
