"""Reports as files, each written whole or not at all."""

import json as jsonlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from parity.report.html import page as as_page
from parity.report.junit import junit as as_junit
from parity.report.report import Report


def write(
    *reports: Report,
    json: str | os.PathLike | None = None,
    junit: str | os.PathLike | None = None,
    page: str | os.PathLike | None = None,
) -> None:
    """Writes what was read of one pair or of several: as JSON, as JUnit XML, as one self-contained HTML page.

    `parity.check` and `parity.replay` return a report; `parity.Report.of(name, …)` makes one of what the others return.
    Each file is written beside its place and renamed. Raises ValueError, before any is written, for what is no report,
    and where no file is named or its folder is not there.
    """
    wrong = sorted({type(report).__name__ for report in reports if not isinstance(report, Report)})
    if wrong or not reports:
        made = "parity.Report.of(name, …) makes one of other results"
        raise ValueError(f"reports must be of parity.Report, got {', '.join(wrong) or 'none'}: {made}")
    files = {kind: Path(file) for kind, file in (("json", json), ("junit", junit), ("page", page)) if file is not None}
    if not files:
        raise ValueError("nothing to write: json, junit or page must name a file")
    for kind, file in files.items():
        if not file.absolute().parent.is_dir():
            raise ValueError(f"{kind}={file} cannot be written: there is no folder {file.absolute().parent}")
    for kind, text in {kind: TEXTS[kind](reports) for kind in files}.items():
        write_beside(files[kind], text)


def as_json(reports: Sequence[Report]) -> str:
    return jsonlib.dumps([report.to_dict() for report in reports], indent=2, allow_nan=False) + "\n"


TEXTS: dict[str, Callable[[Sequence[Report]], str]] = {"json": as_json, "junit": as_junit, "page": as_page}


def write_beside(file: Path, text: str) -> None:
    beside = file.with_name(f".{file.name}.writing")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
