"""`python -m examples.zoo [PAIR …]`: compare pairs of the zoo and write docs/zoo.md; without names all of them.

Each result is stored in runs/zoo when it is there, and the page is written from all of them, so that a run can be
interrupted: --resume leaves out the pairs that have a result.
"""

import functools
import sys
import time
from pathlib import Path

from examples.zoo import page, runner
from examples.zoo.registry import PAIRS
from examples.zoo.truth import CAUSES, located
from jaxmodels.process.arguments import Parser
from jaxmodels.process.programs import run


def main(argv: list[str] | None = None) -> int:
    arguments = Parser(prog="python -m examples.zoo", description="Compare Flax models with PyTorch's.")
    arguments.add_argument("pairs", nargs="*", metavar="PAIR", help=f"pairs to run (default: all): {', '.join(PAIRS)}")
    arguments.add_argument("--resume", action="store_true", help="leave out pairs that have a stored result")
    arguments.add_argument(
        "--results", type=Path, default=Path("runs/zoo"), help="folder of results (default: runs/zoo)"
    )
    arguments.add_argument(
        "--page", type=Path, default=Path("docs/zoo.md"), help="page to write (default: docs/zoo.md)"
    )
    arguments.add_argument("--report", action="store_true", help="print the whole report of each pair")
    options = arguments.parse_args(argv)
    unknown = sorted(set(options.pairs) - PAIRS.keys())
    if unknown:
        raise ValueError(f"pairs: {', '.join(unknown)} must be among {', '.join(PAIRS)}")
    library = runner.prepare()
    names = options.pairs or list(PAIRS)
    if options.resume:
        names = [name for name in names if name not in runner.stored(options.results)]
    for i, name in enumerate(names, 1):
        began = time.perf_counter()
        result = runner.checked(library, name, functools.partial(progress, f"{i}/{len(names)} {name}: "))
        runner.store(options.results, name, result)
        progress("", "")
        verdict = result["verdict"] if page.true(name, result) else f"{result['verdict']}, WRONG"
        noise = page.times(page.number(result["noise"]))
        print(f"{i}/{len(names)} {name}: {verdict}, {noise} × noise, {time.perf_counter() - began:.0f} s", flush=True)
        if options.report or (result["verdict"] == "error" or not page.true(name, result)):
            print(result["report"])
    results = runner.stored(options.results)
    root = Path(library.__file__).parent
    causes = {name: (c, located(root, c.torch), located(root, c.flax)) for name, c in CAUSES.items() if name in results}
    runner.write(options.page, page.page(results, causes))
    wrong = [name for name, result in results.items() if not page.true(name, result)]
    print(f"{len(results) - len(wrong)} of {len(results)} pairs judged truly; wrote {options.page}")
    return 1 if wrong else 0


def progress(start: str, stage: str) -> None:
    """Show what is being done, on one line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{start}{stage}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run(main, "python -m examples.zoo"))
