"""NumPy's .npy files, mapped into memory, without pickles and with one kind of error."""

from pathlib import Path

import numpy as np

from jaxmodels.io.bounded import open_regular
from jaxmodels.process.texts import quoted


def map_array(file: Path) -> np.ndarray:
    """Array of a .npy file, memory-mapped and read-only.

    Raises ValueError, naming the file, if it is missing, damaged, shorter than its header says, or holds anything but
    numbers, such as Python objects as a pickle.
    """
    try:
        open_regular(file).close()
        array = np.lib.format.open_memmap(file, mode="r")  # np.load would also open .npz files
        if array.dtype.kind not in "biufc":  # elements of no bytes fit any number of times into any file
            raise ValueError(f"dtype {array.dtype}")
        return array
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist") from None
    except MemoryError:
        raise ValueError(f"{file} is damaged: its header names a shape that is too large") from None
    # The header is parsed as Python: from damaged ones come SyntaxError, TypeError, tokenize.TokenError and others.
    except Exception as error:
        raise ValueError(f"{file} is not a .npy file of numbers: {quoted(str(error), 200)}") from None
