"""The notebooks: saved with their outputs, shown by the site as they are saved, and they run."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
markdown = pytest.importorskip("markdown")

from docs.tools import notebooks  # noqa: E402

ROOT = Path(__file__).parents[2]
SOURCES = sorted(notebooks.PAGES.values())
RUN = """
import json, sys
from docs.tools import notebooks
from tests.docs.test_notebooks import kinds

print(json.dumps(kinds(notebooks.execute(notebooks.read(notebooks.ROOT / sys.argv[1])))))
"""


def kinds(notebook: Any) -> list[list[str]]:
    """The outputs of each code cell: streams, and the kinds of data."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [sorted({kind for o in cell.outputs for kind in o.get("data", {o.get("name"): 0})}) for cell in cells]


@pytest.mark.parametrize("source", SOURCES)
def test_outputs_are_saved(source):
    cells = [cell for cell in notebooks.read(ROOT / source).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell.outputs for cell in cells)
    for cell in cells:
        assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in cell.outputs)
        text = "".join(output.get("text", "") for output in cell.outputs)
        assert "\r" not in text  # no progress bars
        assert max(map(len, text.splitlines()), default=0) <= 120
        assert not re.search(r"/(home|root|work)\b", text)
        assert any(output.output_type != "stream" for output in cell.outputs) or len(text.splitlines()) < 60


@pytest.mark.parametrize("source", SOURCES)
def test_a_page_has_all_cells_and_outputs(source):
    notebook = notebooks.read(ROOT / source)
    html = notebooks.fill(markdown.markdown(notebooks.page(source), extensions=["extra"]), source)
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    pages, pictures = (sum(kind in data for data in shown) for kind in ("text/html", "image/png"))
    assert html.count("<h1>") == 1 + pages
    assert html.count('<div class="notebook-html">') == pages
    assert html.count('src="data:image/png;base64,iVBOR') == pictures
    assert "NOTEBOOK-OUTPUT" not in html
    assert len(html) < 500_000


def test_a_page_of_every_kind_of_output(tmp_path, monkeypatch):
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": "\x1b[31ma\x1b[0m\n```\n"},
        {
            "output_type": "display_data",
            "metadata": {},
            "data": {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"},
        },
        {"output_type": "execute_result", "metadata": {}, "execution_count": 1, "data": {"text/html": "<p>\n\nx</p>"}},
        {"output_type": "execute_result", "metadata": {}, "execution_count": 1, "data": {"text/plain": "'y'"}},
    ]
    code = {"cell_type": "code", "id": "b", "execution_count": 1, "metadata": {}, "source": "f()", "outputs": outputs}
    cells = [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# T"}, code]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    text = notebooks.page("n.ipynb")
    assert "# T\n\n```python\nf()\n```\n\n````\na\n```\n````" in text
    assert "```\n'y'\n```" in text
    html = notebooks.fill(markdown.markdown(text, extensions=["extra"]), "n.ipynb")
    assert '<div class="notebook-html"><p>\n\nx</p></div>' in html
    assert 'src="data:image/png;base64,iVBORw0KGgo="' in html


def test_what_differs_from_run_to_run_is_left_out():
    shown = f"\x1b[31ma\x1b[0m\x1b[?25h in {tempfile.gettempdir()}/tmpab_12xyz/run\n"
    stream = nbformat.v4.new_output("stream", name="stdout", text=shown)
    picture = {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure size 1 at 0x7f>"}
    outputs = [stream, nbformat.v4.new_output("display_data", data=picture)]
    cell = nbformat.v4.new_code_cell("f()", outputs=outputs, metadata={"execution": {"started": "10:00"}})
    notebook = notebooks.cleaned(nbformat.v4.new_notebook(cells=[cell]))
    assert notebook.cells[0].metadata == {}
    assert notebook.cells[0].outputs[0].text == "a in /tmp/folder/run\n"
    assert notebook.cells[0].outputs[1].data == {"image/png": "iVBORw0KGgo="}
    assert notebook.metadata.language_info.keys() == {"name", "version"}


def test_what_is_no_notebook_is_refused(tmp_path, capsys):
    (tmp_path / "n.ipynb").write_text("[")
    with pytest.raises(ValueError, match=r"n\.ipynb"):
        notebooks.read(tmp_path / "n.ipynb")
    with pytest.raises(ValueError, match="nosuch"):
        notebooks.main(["nosuch"])


@pytest.mark.slow  # trains models
@pytest.mark.parametrize("source", [source for source in SOURCES if "published" not in source])
def test_a_notebook_runs(source, tmp_path):
    """Each shows again what is saved; tests/examples has a test of the one that is left out."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, source], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == kinds(notebooks.read(ROOT / source))


@pytest.mark.slow
def test_a_picture_depends_on_no_list_of_fonts_of_the_user(tmp_path):
    """A list that another installation left has none of Matplotlib's own fonts, and each one would be a warning."""
    pytest.importorskip("matplotlib")
    program = """
import pathlib
import matplotlib.font_manager, nbformat
from docs.tools import notebooks
from tests.docs.test_notebooks import kinds

fonts = matplotlib.font_manager.fontManager
fonts.ttflist = [font for font in fonts.ttflist if font.name == "DejaVu Sans"]
[place] = pathlib.Path(matplotlib.get_cachedir()).glob("fontlist-*.json")
matplotlib.font_manager.json_dump(fonts, place)
cell = nbformat.v4.new_code_cell("import matplotlib.pyplot as plt; plt.loglog([1, 2]); plt.show()")
print(kinds(notebooks.execute(nbformat.v4.new_notebook(cells=[cell]))))
"""
    environment = {**os.environ, "MPLCONFIGDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[['image/png']]\n"


@pytest.mark.slow
def test_notebooks_that_run_at_once_have_sockets_of_their_own():
    program = """
import os, nbformat
from docs.tools import notebooks

cell = nbformat.v4.new_code_cell("import os, time; time.sleep(2); print(os.getppid())")
print(os.getpid() == int(notebooks.execute(nbformat.v4.new_notebook(cells=[cell])).cells[0].outputs[0].text))
"""
    running = [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE) for _ in range(3)]
    assert [one.communicate(timeout=300)[0] for one in running] == [b"True\n"] * 3
