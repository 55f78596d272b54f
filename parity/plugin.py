"""A pytest plugin: a port's own suite gets each part of the harness in one line.

    @pytest.mark.parity_case(half=["bfloat16"])        # parity.check with these arguments, or golden="fixtures/mlp"
    @pytest.mark.parity_sweep(layers=False)            # beside it, or alone: parity.sweep
    @pytest.mark.parity_trajectory(optimizer="adamw")  # parity.trajectory
    @pytest.mark.parity_invariances(batch_axis=0)      # parity.invariances
    def test_port():
        return TorchMLP(), FlaxMLP(rngs=nnx.Rngs(0)), {"x": x}

    def test_port(parity_check):  # parity_sweep, parity_trajectory, parity_invariances
        parity_check(TorchMLP(), FlaxMLP(rngs=nnx.Rngs(0)), {"x": x})

A test fails with the report that says where the models part. `--parity-report FILE.html`, `--parity-json` and
`--parity-junit` write the readings of all of them; `--parity-device` says where Flax runs.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

REPORTS = pytest.StashKey[list]()
MARKERS = {  # the function of parity that judges what a test returns
    "parity_case": "check",
    "parity_sweep": "sweep",
    "parity_trajectory": "trajectory",
    "parity_invariances": "invariances",
}
FILES = {"report": "one self-contained HTML page", "json": "JSON", "junit": "JUnit XML"}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("parity", "Flax models against PyTorch")
    for kind, text in FILES.items():
        group.addoption(f"--parity-{kind}", type=Path, metavar="FILE", help=f"write all readings as {text}")
    group.addoption("--parity-device", choices=["cpu", "gpu", "tpu"], help="where Flax runs (default: JAX's default)")


def pytest_configure(config: pytest.Config) -> None:
    for marker, function in MARKERS.items():
        pair = f"the test returns (torch_module, flax_module, inputs), for parity.{function} with the arguments"
        golden = "; with golden, a fixture's path, it returns the Flax module alone" if function == "check" else ""
        config.addinivalue_line("markers", f"{marker}(**arguments): {pair}{golden}")
    for kind in FILES:
        file = config.getoption(f"--parity-{kind}")
        if file is not None and not file.absolute().parent.is_dir():
            raise pytest.UsageError(f"--parity-{kind}={file}: there is no folder {file.absolute().parent}")
    parallel = getattr(config.option, "numprocesses", None)  # pytest-xdist's
    if parallel and any(config.getoption(f"--parity-{kind}") for kind in FILES):
        raise pytest.UsageError("--parity-report, --parity-json and --parity-junit need one process: leave out -n")
    config.stash[REPORTS] = []


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a marked test and judges what it returns, in every way that it is marked for."""
    markers = {name: marker for name in MARKERS if (marker := pyfuncitem.get_closest_marker(name)) is not None}
    if not markers:
        return None
    names = pyfuncitem._fixtureinfo.argnames
    made = pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names})
    readings = []
    for name, marker in markers.items():
        function, arguments = MARKERS[name], dict(marker.kwargs)
        if function == "check" and (golden := arguments.pop("golden", None)) is not None:
            function, given = "replay", (made, pyfuncitem.path.parent / golden)
        else:
            given = taken(made, name)
        readings.append(functools.partial(read, pyfuncitem, function, *given, **arguments))
    judge(pyfuncitem, readings)
    return True


def taken(made: Any, marker: str) -> tuple[Any, ...]:
    """What a marker's function takes of what the test returned; raises ValueError where it is something else."""
    n = len(made) if isinstance(made, tuple | list) else 0
    if marker == "parity_invariances" and n in (2, 3):
        return tuple(made[-2:])
    if n != 3:
        what = type(made).__name__ if n == 0 else f"{n} values"
        raise ValueError(f"a {marker} returns (torch_module, flax_module, inputs), not {what}")
    return tuple(made)


def read(item: pytest.Item, function: str, *given: Any, **arguments: Any) -> Any:
    """What a function of parity returns, with the run's device, and a check in the name of its test."""
    import parity

    arguments.setdefault("device", item.config.getoption("--parity-device"))
    if function == "check":
        arguments.setdefault("name", item.name)
    return getattr(parity, function)(*given, **arguments)


def judge(item: pytest.Item, readings: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of one pair, whose report joins the run's; raises AssertionError where any is past its limit."""
    import parity

    reports, results = item.config.stash[REPORTS], []
    try:
        for reading in readings:
            results.append(reading())
    except Exception as error:
        reports.append(parity.Report.of(item.name, *results, error=error))
        raise
    named = next((result.name for result in results if isinstance(result, parity.Report)), item.name)
    reports.append(parity.Report.of(named, *results))
    reports[-1].raise_if_failed()
    return results


def fixture_of(function: str) -> Any:
    """The fixture `parity_check` for check, and so on."""

    @pytest.fixture(name=f"parity_{function}")
    def fixture(request: pytest.FixtureRequest) -> Callable[..., Any]:
        """A function of parity that fails the test past its limit, and whose result is in the run's report."""

        def judged(*given: Any, **arguments: Any) -> Any:
            (result,) = judge(request.node, [functools.partial(read, request.node, function, *given, **arguments)])
            return result

        return judged

    return fixture


parity_check, parity_sweep, parity_trajectory, parity_invariances = map(fixture_of, MARKERS.values())


def pytest_sessionfinish(session: pytest.Session) -> None:
    reports = session.config.stash.get(REPORTS, [])
    files = {kind: session.config.getoption(f"--parity-{kind}") for kind in FILES}
    if reports and any(files.values()):
        import parity

        parity.write(*reports, json=files["json"], junit=files["junit"], page=files["report"])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reports = config.stash.get(REPORTS, [])
    if reports:
        passed = sum(report.passed for report in reports)
        terminalreporter.write_line(f"parity: {passed} of {len(reports)} pairs agree")
