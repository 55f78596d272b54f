"""Notebooks of examples/ as pages of the site.

A notebook is stored with its outputs, and the site shows these. `python -m docs.tools.notebooks [NAME …]` runs them
and saves the outputs, in about a minute each on two cores.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmodels.io.atomic import atomic_file
from jaxmodels.process.programs import run

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples"
SECONDS = 900  # of a cell, on a machine that does other work too
# Pages of the site, and their notebooks.
PAGES = {f"examples/{file.stem}.md": f"examples/{file.name}" for file in sorted(FOLDER.glob("*.ipynb"))}
PIECE = "NOTEBOOK-OUTPUT-{}-END"  # stands for a picture or HTML until Markdown has been converted
ANSI = re.compile(r"\x1b\[\??[\d;]*[A-Za-z]")  # colors and cursor movements of a terminal
TEMPORARY = re.compile(re.escape(tempfile.gettempdir()) + r"/tmp\w{8}\b")
LANGUAGE = {"name": "python", "version": "3.11"}
ALT = "Figure drawn by the code above"


def read(file: Path) -> Any:
    """A notebook; raises ValueError if it is not a valid one."""
    import nbformat

    try:
        notebook = nbformat.read(file, as_version=4)
        nbformat.validate(notebook)
    except (nbformat.ValidationError, nbformat.reader.NotJSONError) as error:
        raise ValueError(f"{file} is not a notebook: {error}") from None
    return notebook


def execute(notebook: Any) -> Any:
    """Run all cells of a notebook from the root of the repository, and keep what is shown.

    Raises nbclient's CellExecutionError, with the traceback, if a cell fails.
    """
    import nbclient
    from jupyter_client.manager import AsyncKernelManager

    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # with libtpu installed, JAX prints warnings where there is no TPU
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm's, without widgets
    # The sockets of a kernel lie beside its connection file; their paths may have 107 bytes.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        manager = AsyncKernelManager(
            kernel_name="python3", transport="ipc", connection_file=os.path.join(folder, "kernel.json")
        )
        # Matplotlib reads its settings and its list of fonts here. A list of the user's can be of another installation,
        # and warnings of fonts that are not found would be outputs. It is made first: Matplotlib warns if that is slow.
        environment = {**os.environ, "MPLCONFIGDIR": folder}
        fonts = [sys.executable, "-c", "import matplotlib.font_manager"]
        subprocess.run(fonts, env=environment, stderr=subprocess.DEVNULL, check=False)
        resources = {"metadata": {"path": str(ROOT)}}
        options = {"timeout": SECONDS, "resources": resources, "coalesce_streams": True}
        nbclient.NotebookClient(notebook, manager, **options).execute(env=environment)
    return cleaned(notebook)


def cleaned(notebook: Any) -> Any:
    """Leave out what differs from run to run, and the text of outputs that are pictures or pages."""
    notebook.metadata["language_info"] = dict(LANGUAGE)
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type != "code":
            continue
        for output in cell.outputs:
            if "text" in output:
                output.text = TEMPORARY.sub("/tmp/folder", ANSI.sub("", output.text))
            data = output.get("data", {})
            if any(kind in data for kind in ("image/png", "text/html")):
                data.pop("text/plain", None)
            if "metadata" in output:
                output.metadata = {}
    return notebook


def save(notebook: Any, file: Path) -> None:
    """Write a notebook atomically."""
    import nbformat

    with atomic_file(file) as new:
        nbformat.write(notebook, new)


def page(source: str) -> str:
    """Markdown of a notebook; pictures and outputs in HTML are placeholders, see `fill`."""
    parts: list[str] = []
    for number, cell in enumerate(read(ROOT / source).cells):
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(fenced(cell.source, "python"))
        for place, output in enumerate(cell.outputs):
            data = output.get("data", {})
            if "text/html" in data or "image/png" in data:
                parts.append(PIECE.format(f"{number}-{place}"))
            elif shown := output.get("text") or data.get("text/plain"):
                parts.append(fenced(ANSI.sub("", shown), ""))
    return "\n\n".join(parts) + "\n"


def fenced(text: str, language: str) -> str:
    """A block of code whose fence is longer than any inside."""
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`{3,}", text))])
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def fill(content: str, source: str) -> str:
    """Put pictures and outputs in HTML into a page that was converted from `page`'s Markdown."""
    cells = read(ROOT / source).cells

    def output(match: re.Match[str]) -> str:
        number, place = map(int, match[1].split("-"))
        data = cells[number].outputs[place].data
        if "text/html" in data:
            return f'<div class="notebook-html">{data["text/html"]}</div>'
        picture = "".join(data["image/png"].split())
        return f'<p><img class="notebook-figure" alt="{ALT}" src="data:image/png;base64,{picture}"></p>'

    return re.sub("<p>" + PIECE.format(r"(\d+-\d+)") + "</p>", output, content)


def main(argv: Sequence[str] | None = None) -> int:
    """Run notebooks and save them with their outputs."""
    names = [Path(source).stem for source in PAGES.values()]
    arguments = argparse.ArgumentParser(
        prog="python -m docs.tools.notebooks", description="Run notebooks of examples/ and save their outputs."
    )
    arguments.add_argument("names", nargs="*", metavar="NAME", help=f"notebooks (default: all): {', '.join(names)}")
    options = arguments.parse_args(argv)
    unknown = sorted(set(options.names) - set(names))
    if unknown:
        raise ValueError(f"notebooks: {', '.join(unknown)} must be among {', '.join(names)}")
    for name in options.names or names:
        file = FOLDER / f"{name}.ipynb"
        save(execute(read(file)), file)
        print(f"wrote {file.relative_to(ROOT)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run(main, "python -m docs.tools.notebooks"))
