"""Ids of tokens in the files of others: integers, their digits, or floats without a fraction."""

import re
from typing import Any

from jaxmodels.process.texts import quoted

BEYOND = 2**31  # ids are int32
MOST_ENDS = 1000  # ids that end a text; each is compared with every new token


def token_id(value: Any) -> int | None:
    """Id of a token, an integer or its digits; None for any other value."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,10}", value):
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < BEYOND else None


def special_id(value: Any, key: str, where: object) -> int | None:
    """Id of a special token; None for null and for -1, which some configurations have instead.

    Raises ValueError, naming `where`, for any other value that is no id.
    """
    if isinstance(value, str):
        value = value.strip()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or value in (-1, "-1"):
        return None
    token = token_id(value)
    if token is None:
        raise ValueError(f"{where} has {key}={quoted(value)}; expected an integer from 0 to 2³¹ - 1")
    return token


def end_tokens(value: Any, where: object, key: str = "eos_token_id") -> tuple[int, ...]:
    """Ids that end a text, each once, from one id or a list of them; see `special_id`."""
    several = value if isinstance(value, list) else [value]
    if len(several) > MOST_ENDS:
        raise ValueError(f"{where} has {len(several):,} ids in {key}; at most {MOST_ENDS:,}")
    ids = (special_id(one, key, where) for one in several)
    return tuple(dict.fromkeys(one for one in ids if one is not None))
