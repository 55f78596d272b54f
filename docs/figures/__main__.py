"""Draw all figures: `python -m docs.figures [NAME …]`."""

import importlib
import sys
from pathlib import Path

NAMES = sorted(
    file.stem for file in Path(__file__).parent.glob("*.py") if file.stem not in ("__init__", "__main__", "style")
)

for name in sys.argv[1:] or NAMES:
    importlib.import_module(f"docs.figures.{name}").draw()
