"""NumPy's .npy files, mapped into memory, without pickles and with one kind of error."""

import math
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jaxmodels.io.bounded import open_regular
from jaxmodels.io.shapes import check_shape
from jaxmodels.process.texts import quoted


def map_array(file: Path) -> np.ndarray:
    """Array of a .npy file, memory-mapped and read-only.

    Raises ValueError, naming the file, if it is missing, damaged, shorter or longer than its header says, or holds
    anything but numbers, such as Python objects as a pickle.
    """
    try:
        # Checked before NumPy maps it: it divides by the size of an element, which may be 0 and ends the process.
        with open_regular(file) as content:
            shape, dtype = read_header(content)
            start, size = content.tell(), os.fstat(content.fileno()).st_size
        if dtype.kind not in "biufc" or min(shape, default=0) < 0:
            raise ValueError(f"dtype {dtype}, shape {shape}")
        check_shape(shape)
        end = start + math.prod(shape) * dtype.itemsize
        if end != size:  # also before NumPy computes with the shape, which may overflow
            raise ValueError(f"its array ends at byte {end:,}, the file has {size:,}")
        return np.lib.format.open_memmap(file, mode="r")  # np.load would also open .npz files
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist") from None
    except MemoryError:
        raise ValueError(f"{file} is damaged: its header names a shape that is too large") from None
    # The header is parsed as Python: from damaged ones come SyntaxError, TypeError, tokenize.TokenError and others.
    except Exception as error:
        reason = str(error).partition("\n")[0]  # NumPy's second line advises to trust the file and allow pickles
        raise ValueError(f"{file} is not a .npy file of numbers: {quoted(reason, 200)}") from None


def read_header(content: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype in the header of a .npy file; raises various errors if it is damaged."""
    version = np.lib.format.read_magic(content)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:  # 3.0 is for names in other alphabets, which numbers do not have
        raise ValueError(f"format {version}")
    shape, _, dtype = readers[version](content)
    return shape, dtype
