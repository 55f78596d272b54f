"""Write the table of docs/agreement.md: `parity --json FILE`, then `python -m docs.tools.agreement FILE`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmodels.io.atomic import atomic_file
from parity.report.columns import TABLES

PAGE = Path(__file__).parents[1] / "agreement.md"
BEGIN, END = "<!-- table: written by docs.tools.agreement -->\n", "<!-- end of the table -->\n"


def table(reports: Sequence[dict[str, Any]]) -> str:
    """Markdown of the readings of all cases, one row each; columns without a value in any case are left out."""
    rows = [{cell["title"]: cell["text"] for cell in report["columns"]} for report in reports]
    kept = [c.title for c in TABLES["case"] if sum(row.get(c.title, "–") != "–" for row in rows) > 1]
    lines = ["| case | " + " | ".join(kept) + " |", "|---" + "|---:" * len(kept) + "|"]
    for report, row in zip(reports, rows, strict=True):
        lines.append(f"| {report['name']} | " + " | ".join(row.get(title, "–") for title in kept) + " |")
    agree = sum(report["passed"] for report in reports)
    where = reports[0]["environment"]
    versions = ", ".join(f"{name} {where[name]}" for name in ("jax", "flax", "torch", "python") if name in where)
    lines.append(f"\n{agree} of {len(reports)} cases agree, {where.get('date', '')}, {versions}.")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    """Replace the table of the page."""
    reports = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{PAGE} has no lines {BEGIN!r} and {END!r}")
    before, _, rest = text.partition(BEGIN)
    with atomic_file(PAGE) as file:
        file.write_text(f"{before}{BEGIN}\n{table(reports)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
