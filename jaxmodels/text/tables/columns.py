"""Rows of a column of strings in Arrow and Parquet files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.io.bounded import open_regular
from jaxmodels.io.content import recognised
from jaxmodels.process.extras import require
from jaxmodels.process.texts import quoted
from jaxmodels.text.tables import arrow, parquet
from jaxmodels.text.tables.sizes import EXPANSION, check_single, check_strings, largest_sum

VIEW = 16  # bytes of a view, which begins with the length of its text (4 bytes)


def columns(file: Path, kind: str, field: str, offset: int, among: int = 1) -> Iterator[tuple[str, str, int, int]]:
    """Name, text, number and next number of each row of an Arrow or Parquet file; empty values are left out.

    among: number of the files that are read together. Raises ValueError, naming the file, if it is damaged, has no such
    column of strings, or stands for far more text than it has bytes.
    """
    require("data", "pyarrow")
    open_regular(file).close()
    row, most, viewed = 0, largest_sum(file, among), 0
    batches = arrow.batches(file, field, among) if kind == "arrow" else parquet.batches(file, field)
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            if row + batch.num_rows <= offset:
                row += batch.num_rows
                continue
            column = strings(file, batch, field)
            viewed += bytes_of_views(column)
            if viewed > largest_sum(file, among):
                raise ValueError(f"{file} has views of more than {EXPANSION:,} times as much text as it has bytes")
            column.validate(full=True)  # offsets outside the file would end the process
            for i in range(len(column)):  # one by one: rows may repeat one text of any length
                text = column[i].as_py()
                most -= len(text or "")
                if most < 0:
                    raise ValueError(f"{file} holds more than {EXPANSION:,} times as much text as it has bytes")
                if text is not None and row >= offset:
                    yield f"{file}, row {row:,}", text, row, row + 1
                row += 1
        except GeneratorExit:
            raise
        except Exception as error:  # pyarrow raises many kinds for damaged files
            if str(error).startswith(str(file)):
                raise
            reason = recognised(file) or f"is not a readable {kind.capitalize()} file: {quoted(str(error), 200)}"
            raise ValueError(f"{file} {reason}") from None


def strings(file: Path, batch: Any, field: str) -> Any:
    """Column of strings of a batch; raises ValueError if there is none of that name."""
    if field not in batch.schema.names:
        names = ", ".join(quoted(name, 40) for name in batch.schema.names[:20])
        raise ValueError(f"{file} has no column {quoted(field)}; it has {names}")
    check_single(file, batch.schema.names, field)
    column = batch.column(batch.schema.names.index(field))
    check_strings(file, column.type, field)
    return column


def bytes_of_views(column: Any) -> int:
    """Bytes of all texts of a column of string_view, or of its dictionary: many may be views of one text.

    Each is looked at when the column is validated. 0 for other types, whose texts are as long as the column. Raises
    ValueError if there are fewer views than rows, which would end the process.
    """
    import pyarrow

    values = column.dictionary if pyarrow.types.is_dictionary(column.type) else column
    if not pyarrow.types.is_string_view(values.type) or not len(values):
        return 0
    views, end = values.buffers()[1], VIEW * (values.offset + len(values))
    if views is None or views.size < end:
        raise ValueError(f"{len(values):,} texts, but {views.size if views else 0:,} bytes of views")
    lengths = np.frombuffer(views, "<i4", end // 4)[VIEW // 4 * values.offset :: VIEW // 4]
    return int(lengths.sum(dtype=np.int64, where=lengths > 0))
