"""One line for the exceptions of libraries that wrote files."""

import errno
import re
from pathlib import Path

import pytest
import torch

from jaxmodels.io import bounded
from jaxmodels.io.bounded import errors_naming
from jaxmodels.process import programs
from jaxmodels.process.failures import cause, memory_naming, naming, refusal

LONG = (
    'RESOURCE_EXHAUSTED: Failed writing: "/runs/a/7/model/d/54ae": Failed to write 43 bytes to file 40: No space left '
    "on device [os_error_code='28']\nTraceback …"
)


def test_the_reason_and_the_file_are_found_in_what_was_raised():
    folder = Path("/runs/a/7")
    assert cause(ValueError(LONG), folder) == "/runs/a/7/model/d/54ae: No space left on device"
    outer = RuntimeError("save failed")
    outer.__cause__ = ExceptionGroup("several", [TypeError("x"), ValueError(LONG)])
    assert cause(outer, folder) == "/runs/a/7/model/d/54ae: No space left on device"
    assert cause(PermissionError(13, "Permission denied", "/runs/b"), folder) == "/runs/b: Permission denied"
    assert cause(OSError(28, "No space left on device"), folder) == "/runs/a/7: No space left on device"
    assert cause(KeyError("no\nfile"), folder).startswith("/runs/a/7: ")
    assert cause(ValueError("x" * 1000 + "\ny"), folder) == f"/runs/a/7: {'x' * 200} …"


def test_an_error_without_a_file_gets_one():
    with pytest.raises(OSError, match="'/runs/a'") as caught, naming(Path("/runs/a")):
        raise OSError(28, "No space left on device")
    assert (caught.value.errno, caught.value.filename) == (28, "/runs/a")
    with pytest.raises(OSError, match="'/runs/b'"), naming(Path("/runs/a")):
        raise OSError(28, "No space left on device", "/runs/b")


def test_a_number_that_numpy_does_not_give_is_that_of_a_failed_disk():
    with pytest.raises(OSError, match="8 requested and 0 written: '/runs/a'") as caught, naming(Path("/runs/a")):
        raise OSError("8 requested and 0 written")
    assert caught.value.errno == errno.EIO


def test_a_refusal_of_the_operating_system_is_found_in_an_error_of_a_library():
    found = refusal(ValueError(LONG), Path("/runs/a/7"))
    assert found is not None
    assert (found.errno, found.filename) == (errno.ENOSPC, "/runs/a/7/model/d/54ae")
    assert refusal(ValueError("no array"), Path("/runs/a/7")) is None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "model/config.json"),
        (MemoryError("8 TiB"), "model/config.json: 8 TiB"),
        (RuntimeError("RESOURCE_EXHAUSTED: 8 TiB\nat"), "model/config.json: RESOURCE_EXHAUSTED: 8 TiB"),
        (RuntimeError("INTERNAL: Out of memory allocating 8 bytes"), "model/config.json: INTERNAL: Out of memory .* 8"),
        (
            RuntimeError("[enforce fail at x.cpp:1] . DefaultCPUAllocator: can't allocate memory: 8"),
            "model/config.json: ",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 TiB"),
            "model/config.json: CUDA out of memory",
        ),
        (RuntimeError("INTERNAL: YNNPACK operation failed: error"), "model/config.json: INTERNAL: YNNPACK"),
        (MemoryError("model/config.json: 8 TiB"), "model/config.json: 8 TiB"),
    ],
)
def test_want_of_memory_names_the_file_once(error, message):
    def fail():
        raise error

    with pytest.raises(MemoryError) as raised, memory_naming("model"), errors_naming(Path("model/config.json")):
        fail()
    assert re.match(message, str(raised.value))
    assert programs.run(memory_naming("model/config.json")(fail), "command") == 2


def test_the_words_of_pytorch_are_known():
    with pytest.raises(MemoryError, match=r"^model: "), memory_naming("model"):
        torch.empty(2**60, dtype=torch.uint8)


def test_another_runtime_error_is_a_bug():
    with pytest.raises(RuntimeError, match=r"^bug$"), memory_naming("model"):
        raise RuntimeError("bug")


def test_a_file_that_takes_all_memory_is_named(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    file.write_text("[]")

    def loads(text, **options):
        raise MemoryError

    monkeypatch.setattr(bounded.json, "loads", loads)
    with pytest.raises(MemoryError, match=r"config\.json$"):
        bounded.read_json(file)
