"""Errors of functions that compiled programs call on the host: XLA raises a text with tracebacks in their place."""

import functools
import logging
from collections.abc import Callable
from typing import Any

failed: list[Exception] = []  # the last error of such a function


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """Function for `jax.pure_callback` whose ValueError or OSError `original` finds, and JAX does not log."""
    logging.getLogger("jax._src.callback").addFilter(is_not_found)  # once: a logger keeps one of each filter

    @functools.wraps(function, updated=())
    def called(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (ValueError, OSError) as error:
            failed[:] = [error]
            raise

    return called


def original(error: BaseException) -> Exception | None:
    """The error of a function on the host that an error of XLA stands for; None if it is another error."""
    return next((one for one in failed if f"{type(one).__name__}: {one}" in str(error)), None)


def is_not_found(record: logging.LogRecord) -> bool:
    """False for JAX's report of an error that `original` finds."""
    return not record.exc_info or record.exc_info[1] not in failed
