"""Reports as files, each written whole or not at all."""

import json as jsonlib
from collections.abc import Sequence
from pathlib import Path

from parity.junit import junit as as_junit
from parity.page import page
from parity.report import Report


def write(
    reports: Sequence[Report], *, json: Path | None = None, junit: Path | None = None, report: Path | None = None
) -> None:
    """Writes JSON, JUnit XML and an HTML page, those that are named."""
    if json:
        write_beside(json, jsonlib.dumps([r.to_dict() for r in reports], indent=2, allow_nan=False) + "\n")
    if junit:
        write_beside(junit, as_junit(reports))
    if report:
        write_beside(report, page(list(reports)))


def write_beside(file: Path, text: str) -> None:
    beside = file.with_name(f".{file.name}.writing")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
