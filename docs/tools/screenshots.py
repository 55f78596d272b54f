"""Pictures of README.md and of the site: `python -m docs.tools.screenshots`.

Runs the first Python block of README.md, writes its report as a page, and photographs it with Chromium, light and dark.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

import parity
from docs.tools.browser import Browser

ROOT = Path(__file__).parents[2]
WIDTH, SCALE, COLORS = 960, 1.5, 256


def report() -> parity.Report:
    """Report of the port with a bug in README.md."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    namespace: dict[str, Any] = {}
    exec(compile(blocks[0], "README.md", "exec"), namespace)
    found: parity.Report = namespace["report"]
    return found


def main() -> None:
    """Write `docs/assets/report-light.png` and `report-dark.png`."""
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        page = Path(folder) / "report.html"
        parity.write(report(), page=str(page))
        for name in ("light", "dark"):
            browser.open(page.as_uri(), width=WIDTH, height=700, dark=name == "dark", scale=SCALE)
            # Down to the end of the tree; the environment below it is of no interest here.
            end = browser.run("document.querySelector('dl').getBoundingClientRect().bottom")
            file = ROOT / "docs" / "assets" / f"report-{name}.png"
            browser.screenshot(file, clip=(0, 0, WIDTH, end + 16))
            Image.open(file).convert("RGB").quantize(COLORS, kmeans=1).save(file, optimize=True)


if __name__ == "__main__":
    main()
