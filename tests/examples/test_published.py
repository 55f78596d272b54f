"""The notebook of a published checkpoint: its cells run from beginning to end, and its saved outputs are of one run."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples" / "published.ipynb"
CHECKS = """
after = score(tuned, documents, tokenizer=tokenizer, stride=64)
assert after.total.loss < before.total.loss
assert theirs.config.eos_token_id == 0
assert abs(loss - ours) / loss < 1e-6
"""


def code_cells() -> list[dict]:
    return [cell for cell in json.loads(FILE.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_outputs_are_saved():
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        tree = ast.parse("".join(cell["source"]))
        if isinstance(tree.body[-1], ast.Expr):  # a value, or a printed line
            assert cell["outputs"], "".join(cell["source"])
        assert not any(output["output_type"] == "error" for output in cell["outputs"])


@pytest.mark.slow  # fine-tunes
def test_the_cells_run(tmp_path):
    pytest.importorskip("transformers")
    script = tmp_path / "published.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in code_cells()) + CHECKS, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("True, ") == 2  # the losses of transformers
