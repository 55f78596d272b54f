"""Write reports to files: JSON, JUnit XML, HTML."""

import json as jsonlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jaxmodels.io.atomic import atomic_file, check_file
from parity.report.junit import junit as as_junit
from parity.report.page.html import page as as_page
from parity.report.report import Report


def write(
    *reports: Report,
    json: str | os.PathLike[str] | None = None,
    junit: str | os.PathLike[str] | None = None,
    page: str | os.PathLike[str] | None = None,
) -> None:
    """Write reports as JSON, as JUnit XML and as one self-contained HTML page (`page`).

    `parity.check` and `parity.replay` return a report; `parity.Report.of(name, …)` makes one of other results. Writes
    are atomic. Raises ValueError, before any file is written, for an object that is not a report, if no file is named,
    if a file's folder does not exist, and if two arguments name one file.
    """
    wrong = sorted({type(report).__name__ for report in reports if not isinstance(report, Report)})
    if wrong or not reports:
        got = ", ".join(wrong) or "none"
        raise ValueError(
            f"reports: got {got}; pass parity.Report (parity.Report.of(name, …) makes one of other results)"
        )
    targets = (("json", json), ("junit", junit), ("page", page))
    files = {argument: Path(file) for argument, file in targets if file is not None}
    if not files:
        raise ValueError("json=None, junit=None, page=None: at least one must name a file")
    check_files(files)
    texts = {argument: FORMATS[argument](reports) for argument in files}
    for argument, text in texts.items():
        with atomic_file(files[argument]) as target:
            target.write_text(text, encoding="utf-8")


def check_files(files: Mapping[str, Path | None]) -> None:
    """Raise ValueError, naming the argument, if files to write, by argument, cannot be written.

    That is if the folder of one does not exist, if one is no regular file, or if two are the same file.
    """
    places: dict[Path, str] = {}
    for argument, file in files.items():
        if file is None:
            continue
        if not (folder := file.absolute().parent).is_dir():
            raise ValueError(f"{argument}={file}: folder {folder} does not exist")
        try:
            check_file(file)
        except ValueError as error:
            raise ValueError(f"{argument}={file}: {error}") from None
        other = places.setdefault(folder.resolve() / file.name, argument)
        if other != argument:
            raise ValueError(f"{argument}={file}: {other} names the same file")


def as_json(reports: Sequence[Report]) -> str:
    found = [report.to_dict() for report in reports]
    text = jsonlib.dumps(found, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # a lone surrogate becomes JSON's \uXXXX


FORMATS: dict[str, Callable[[Sequence[Report]], str]] = {"json": as_json, "junit": as_junit, "page": as_page}
