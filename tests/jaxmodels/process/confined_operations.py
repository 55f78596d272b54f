"""Operations of a confined process that go wrong in several ways."""

import ctypes
import os
import time

from jaxmodels.process.confined import Attached


class PanicException(BaseException):
    """As of Rust, which is no Exception."""


def fail():
    raise RuntimeError("first line\nsecond line")


def panic():
    os.write(2, b"thread panicked\nnote: run with RUST_BACKTRACE=1\n")
    raise PanicException("index out of bounds\nnote: more")


def hang():
    while True:
        pass


def swell():
    found = []
    while True:
        found.append(bytes(10**7))


def operations(number):
    if number is None:
        raise ValueError("argument is null")
    return {
        "add": lambda other: number + other,
        "echo": lambda text: text,
        "attach": lambda *texts: Attached(len(texts), [memoryview(text.encode()) for text in texts]),
        "process": os.getpid,
        "hang": hang,
        "swell": swell,
        "abort": os.abort,
        "fault": lambda: ctypes.string_at(0),
        "leave": lambda: os._exit(3),
        "fail": fail,
        "panic": panic,
        "sleep": lambda: time.sleep(100),
    }
