"""A file to begin an experiment with: `jaxmodels new FILE`."""

import argparse
import keyword
import os
from collections.abc import Sequence
from pathlib import Path

from jaxmodels.io.atomic import atomic_file
from jaxmodels.process import programs
from jaxmodels.process.arguments import Parser
from jaxmodels.process.paths import local
from jaxmodels.process.texts import visible

EXAMPLES = """\
examples:
  jaxmodels new my_experiment.py
"""
TEMPLATE = Path(__file__).with_name("template.py")
NAME = "my_experiment"


def parser(prog: str = "jaxmodels new") -> argparse.ArgumentParser:
    arguments = Parser(
        prog=prog,
        description="Write a file with a model, its hyperparameters and the script that trains it, to be changed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument("file", type=Path, metavar="FILE", help="file to create, such as my_experiment.py")
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = "jaxmodels new") -> int:
    """Run the command and return its exit code; `prog` is the command as typed."""
    options = parser(prog).parse_args(argv)
    return programs.run(lambda: write(local(options.file, "FILE")), prog)


def write(file: Path) -> None:
    """Write the template under a module's name; raises ValueError if the file exists or is no module."""
    name = file.stem
    if file.suffix != ".py" or not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"FILE={file} must be a Python module, such as {NAME}.py")
    if os.path.lexists(file):
        raise ValueError(f"FILE={file} exists; name another file")
    with atomic_file(file) as new:
        new.write_text(TEMPLATE.read_text(encoding="utf-8").replace(NAME, name), encoding="utf-8")
    print(visible(f"{file}: train it with python {file}, see python {file} --help"))
