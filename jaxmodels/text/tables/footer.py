"""Places of the pages of columns in a Parquet file, read from its footer in a child process of `process.confined`.

Arrow ends the process, without an error of Python, for some footers: such as those whose statistics of a column have
another length than its type says.
"""

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxmodels.io.bounded import open_regular
from jaxmodels.process.confined import Confined

# Of the child process: processor time to start, to read, and for each byte of the file; memory.
STARTING, SECONDS, SECONDS_PER_BYTE, MEGABYTES = 30.0, 3.0, 1e-7, 500.0
MEMORY_PER_BYTE = 10  # of the footer


def operations() -> Mapping[str, Callable[..., Any]]:
    """Operation `places`."""
    from pyarrow import parquet

    def places(file: str, leaves: list[int]) -> list[list[list[int]]]:
        """Number of rows and of values, and places from and to of the pages, of each group of rows of each column."""
        with parquet.ParquetFile(file) as opened:
            groups = [opened.metadata.row_group(i) for i in range(opened.metadata.num_row_groups)]
            return [
                [[group.num_rows, group.column(leaf).num_values, *place_of(group.column(leaf))] for group in groups]
                for leaf in leaves
            ]

    return {"places": places}


def place_of(column: Any) -> tuple[int, int]:
    """Places in the file, from and to, of the pages of a column in a group of rows."""
    dictionary = column.dictionary_page_offset
    begin = column.data_page_offset if not dictionary else min(dictionary, column.data_page_offset)
    return begin, begin + column.total_compressed_size


@functools.cache
def reader() -> Confined:
    """Child process that reads footers; another one if it was ended."""
    return Confined(__name__, seconds=STARTING, megabytes=MEGABYTES)


def footer_bytes(file: Path) -> int:
    """Bytes of the footer, which are in the last eight of a file; no more than it has."""
    with open_regular(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        opened.seek(max(0, size - 8))
        return min(size, int.from_bytes(opened.read(4), "little"))


def places(file: Path, leaves: list[int]) -> list[list[tuple[int, int, int, int]]]:
    """Operation `places`; raises ValueError, naming the file, if the footer cannot be read within the limits."""
    seconds = SECONDS + SECONDS_PER_BYTE * file.stat().st_size
    megabytes = MEGABYTES + MEMORY_PER_BYTE * footer_bytes(file) / 1e6
    try:
        found = reader().call("places", str(file.absolute()), leaves, seconds=seconds, megabytes=megabytes)
    except ValueError as error:
        raise ValueError(f"{file} has a footer that is not read: {error}") from None
    return [[(rows, values, begin, end) for rows, values, begin, end in column] for column in found]
