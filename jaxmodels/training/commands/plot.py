"""Loss curves of runs as a picture: `jaxmodels plot`, or `python -m train.plot` in a checkout."""

import argparse
import array
import contextlib
import importlib.util
import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from jaxmodels.io.atomic import atomic_file, check_file
from jaxmodels.process import programs
from jaxmodels.process.arguments import Parser
from jaxmodels.process.extras import require
from jaxmodels.process.paths import local
from jaxmodels.process.texts import shortened, visible
from jaxmodels.training import metrics

PROGRAM = "python -m train.plot"
EXAMPLES = """\
examples:
  jaxmodels plot runs/rope runs/synthesizer/* --out curves.png
"""
FORMATS = (".png", ".svg", ".pdf")  # others need programs that may not be there, such as LaTeX
LABEL = 80  # characters of a run's name
POINTS = 200  # of a curve of training losses, each the mean of several steps
MARKS = 2_000  # of a curve of validation losses, more than a picture is wide


def parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    arguments = Parser(
        prog=prog,
        description="Draw training losses as lines and validation losses as points, in nats per token.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    arguments.add_argument(
        "--out",
        type=Path,
        default=Path("curves.png"),
        metavar="FILE",
        help="file to write, .png, .svg or .pdf (default curves.png)",
    )
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Run the command and return its exit code; `prog` is the command as typed."""
    options = parser(prog).parse_args(argv)
    return programs.run(lambda: draw([local(run, "RUN") for run in options.runs], local(options.out, "out")), prog)


def curves(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses of training [n, 2], averaged to POINTS points, and of validation [m, 2], `thinned`.

    Raises ValueError if the run has none.
    """
    numbers: dict[str, array.array] = {
        name: array.array("d") for name in metrics.LOSSES
    }  # a list takes 20 times as much
    for line in metrics.each(run):
        for name, found in numbers.items():
            if line.get(name) is not None and math.isfinite(line[name]):
                found.extend((line["step"], line[name]))
    train, validation = (np.frombuffer(numbers[name], np.float64).reshape(-1, 2) for name in metrics.LOSSES)
    if not len(train):
        raise ValueError(f"{run / metrics.FILE} has no losses yet")
    parts = np.array_split(train, min(len(train), POINTS))
    return np.array([part.mean(axis=0) for part in parts]), thinned(validation)


def import_matplotlib() -> tuple[ModuleType, ModuleType]:
    """Import matplotlib, with pyplot.

    It prefers a matplotlibrc in the current folder, which may be of others, to that of MATPLOTLIBRC: the package's
    own folder is the current one meanwhile.
    """
    require("train", "matplotlib")
    found = importlib.util.find_spec("matplotlib")
    assert found is not None
    assert found.origin is not None
    with contextlib.chdir(Path(found.origin).parent):
        import matplotlib

        matplotlib.use("agg")  # no window
        from matplotlib import pyplot
    return matplotlib, pyplot


def thinned(points: np.ndarray) -> np.ndarray:
    """At most MARKS + 1 points of a curve, float [n, 2]: the lowest and highest of each part, and the last."""
    if len(points) <= MARKS:
        return points
    ends = [part[sorted([part[:, 1].argmin(), part[:, 1].argmax()])] for part in np.array_split(points, MARKS // 2)]
    return np.concatenate([*ends, points[-1:]])


def draw(runs: Sequence[Path], out: Path) -> None:
    """Plot several runs to a file; raises ValueError for another format, and if one of the runs has no losses."""
    if out.suffix not in ("", *FORMATS):
        raise ValueError(f"out={str(out)!r} must end in {', '.join(FORMATS)}")
    check_file(out)
    found = {run: curves(run) for run in runs}
    matplotlib, pyplot = import_matplotlib()
    # No settings but the defaults: texts drawn by LaTeX, for one, would start programs.
    with pyplot.rc_context(matplotlib.rcParamsDefault), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on names that the font lacks, or that leave no room
        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        shown = []
        for run, (train, validation) in found.items():
            (line,) = axes.plot(*train.T, alpha=0.5)
            last = f": {validation[-1, 1]:.3f} at step {validation[-1, 0]:,.0f}" if len(validation) else ""
            (points,) = axes.plot(*validation.T, "o-", color=line.get_color())
            shown.append((points, f"{shortened(str(run), LABEL)}{last}"))
        axes.set(xlabel="step", ylabel="nats per token; line: training, points: validation")
        # Handles and labels: a label that begins with _ would be left out. A name is no formula, whatever it holds.
        for text in axes.legend(*zip(*shown, strict=True)).get_texts():
            text.set_parse_math(False)
        image = io.BytesIO()  # Matplotlib's own writer of PDF raises an AttributeError on a full disk
        figure.savefig(image, format=out.suffix.removeprefix(".") or "png", dpi=120)
        with atomic_file(out) as temporary:
            temporary.write_bytes(image.getvalue())
        pyplot.close(figure)
    print(visible(f"{out}: {len(found)} run{'s' * (len(found) > 1)}"))
