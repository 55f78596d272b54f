"""Pytest plugin: markers and fixtures that run `parity.check`, `sweep`, `trajectory` and `invariances` on a port.

    @pytest.mark.parity_case(half=["bfloat16"])        # parity.check with these arguments, or golden="fixtures/mlp"
    @pytest.mark.parity_sweep(layers=False)            # together with parity_case, or alone: parity.sweep
    @pytest.mark.parity_trajectory(optimizer="adamw")  # parity.trajectory
    @pytest.mark.parity_invariances(batch_axis=0)      # parity.invariances
    def test_port():
        return TorchMLP(), FlaxMLP(rngs=nnx.Rngs(0)), {"x": x}

    def test_port(parity_check):  # parity_sweep, parity_trajectory, parity_invariances
        parity_check(TorchMLP(), FlaxMLP(rngs=nnx.Rngs(0)), {"x": x})

A failing test shows the first divergence and the failed readings; with -v the whole report, with --full-trace the
traceback instead. With -v in a terminal the current stage of a test is shown behind its name.
`--parity-report FILE.html`, `--parity-json FILE` and `--parity-junit FILE` write the reports of all tests;
`--parity-device` is the device for Flax.
"""

import dataclasses
import functools
import inspect
import os
import shutil
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from parity.report.report import Report

REPORTS = pytest.StashKey[list["Report"]]()
UNWRITTEN = pytest.StashKey[str]()  # why the reports could not be written
MARKERS = {  # marker: the function of parity that takes the test's return value
    "parity_case": "check",
    "parity_sweep": "sweep",
    "parity_trajectory": "trajectory",
    "parity_invariances": "invariances",
}
FIXTURES = {f"parity_{function}" for function in MARKERS.values()}
FILES = {"report": "one self-contained HTML page", "json": "JSON", "junit": "JUnit XML"}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("parity", "Flax models against PyTorch")
    for kind, text in FILES.items():
        group.addoption(f"--parity-{kind}", type=Path, metavar="FILE", help=f"write all reports as {text}")
    group.addoption(
        "--parity-device", choices=["cpu", "gpu", "tpu"], help="device for Flax (default: JAX's default device)"
    )


def pytest_configure(config: pytest.Config) -> None:
    for marker, function in MARKERS.items():
        text = f"call parity.{function} with the test's return value (torch_module, flax_module, inputs)"
        golden = "; with golden=FIXTURE the test returns only the Flax module" if function == "check" else ""
        config.addinivalue_line("markers", f"{marker}(**arguments): {text}{golden}")
    check_reports({f"--parity-{kind}": config.getoption(f"--parity-{kind}") for kind in FILES})
    parallel = getattr(config.option, "numprocesses", None)  # option -n of pytest-xdist
    if parallel and any(config.getoption(f"--parity-{kind}") for kind in FILES):
        raise pytest.UsageError(
            f"-n {parallel}: --parity-report, --parity-json and --parity-junit need a single process"
        )
    config.stash[REPORTS] = []


def check_reports(files: Mapping[str, Path | None]) -> None:
    """Raise UsageError, which pytest prints as one line, for files, by argument, that reports cannot be written to."""
    from jaxmodels.process.texts import visible
    from parity.report.write import check_files

    try:
        check_files(files)
    except (OSError, ValueError) as error:
        raise pytest.UsageError(visible(str(error))) from None


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a marked test and call the function of each of its markers with its return value."""
    __tracebackhide__ = True
    markers = {name: marker for name in MARKERS if (marker := pyfuncitem.get_closest_marker(name)) is not None}
    if not markers:
        return None
    names = pyfuncitem._fixtureinfo.argnames
    returned = pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names})
    calls = []
    for name, marker in markers.items():
        function, arguments = MARKERS[name], dict(marker.kwargs)
        if function == "check" and (golden := arguments.pop("golden", None)) is not None:
            function, values = "replay", (returned, pyfuncitem.path.parent / golden)
        else:
            values = values_for(name, returned)
        calls.append(functools.partial(call, pyfuncitem, function, *values, **arguments))
    run_and_report(pyfuncitem, calls)
    return True


def values_for(marker: str, returned: Any) -> tuple[Any, ...]:
    """Positional arguments of a marker's function. Raises ValueError for any other return value of the test."""
    __tracebackhide__ = True
    n = len(returned) if isinstance(returned, tuple | list) else 0
    if marker == "parity_invariances" and n in (2, 3):
        return tuple(returned[-2:])
    if n != 3:
        got = type(returned).__name__ if n == 0 else f"{n} values"
        raise ValueError(f"{marker}: the test returned {got}; it must return (torch_module, flax_module, inputs)")
    return tuple(returned)


def call(item: pytest.Item, function: str, *values: Any, **arguments: Any) -> Any:
    """Call a function of parity, by default on the device of --parity-device; a check has the test's name."""
    __tracebackhide__ = True
    import parity

    arguments.setdefault("device", item.config.getoption("--parity-device"))
    if function == "check":
        arguments.setdefault("name", item.name)
    called = getattr(parity, function)
    if "progress" in inspect.signature(called).parameters:
        arguments.setdefault("progress", functools.partial(show_stage, item, function))
    try:
        return called(*values, **arguments)
    finally:
        show_stage(item)


def show_stage(item: pytest.Item, function: str = "", stage: object = "") -> None:
    """Show what is running behind the test's name, with -v in a terminal; nothing: erase it."""
    reporter = item.config.pluginmanager.getplugin("terminalreporter")
    terminal = getattr(reporter, "isatty", False) and os.environ.get("TERM") != "dumb"
    if item.config.get_verbosity() < 1 or not terminal:
        return
    from jaxmodels.process.texts import visible

    room = shutil.get_terminal_size().columns - len(item.nodeid) - 2
    shown = visible(f"{function} {stage}").strip()[: max(room, 0)]
    capture = item.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():  # save the cursor's place, write, erase to the end of the line, go back
        sys.stdout.write(f"\x1b7{shown}\x1b[K\x1b8")
        sys.stdout.flush()


def run_and_report(item: pytest.Item, calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run the calls for one pair and return their results, after adding one report of them to the session's.

    Raises AssertionError if a check exceeds its limit.
    """
    __tracebackhide__ = True
    import parity

    reports, results = item.config.stash[REPORTS], []
    try:
        for one in calls:
            results.append(one())
    except Exception as error:
        reports.append(parity.Report.of(item.name, *results, error=error))
        raise
    name = next((result.name for result in results if isinstance(result, parity.Report)), item.name)
    reports.append(parity.Report.of(name, *results))
    reports[-1].raise_if_failed()
    return results


def fixture_of(function: str) -> Any:
    """Fixture for a function: `parity_check` for check, and so on."""

    @pytest.fixture(name=f"parity_{function}")
    def fixture(request: pytest.FixtureRequest) -> Callable[..., Any]:
        """Call the function; fail the test if a limit is exceeded, and add the result to the session's report."""

        def wrapped(*values: Any, **arguments: Any) -> Any:
            __tracebackhide__ = True
            one = functools.partial(call, request.node, function, *values, **arguments)
            (result,) = run_and_report(request.node, [one])
            return result

        return wrapped

    return fixture


parity_check, parity_sweep, parity_trajectory, parity_invariances = map(fixture_of, MARKERS.values())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show a pair that differs as its report, and refused arguments as their message, without the frames inside."""
    result = yield
    if call.excinfo is not None and result.failed and not item.config.getoption("fulltrace"):
        error, path, line = call.excinfo.value, *place(item, call.excinfo)
        brief = item.config.getoption("tbstyle") == "line"
        reports = sys.modules.get("parity.report.report")  # it has been imported if its exception was raised
        if reports is not None and isinstance(error, reports.Differs):
            from parity.report.failure import differs

            whole = item.config.get_verbosity() > 0
            shown = differs(error.report, path, line, whole=whole)
            result.longrepr = dataclasses.replace(shown, brief=brief)  # type: ignore[assignment]
        elif isinstance(error, ValueError) and refused(item, call.excinfo):
            from parity.report.failure import refusal

            result.longrepr = dataclasses.replace(refusal(error, path, line), brief=brief)  # type: ignore[assignment]
    return result


def place(item: pytest.Item, raised: pytest.ExceptionInfo[BaseException]) -> tuple[str, int]:
    """File and line of the test that failed; the test's first line if it had returned."""
    path, line, _ = item.location
    own = [entry.lineno for entry in raised.traceback if Path(str(entry.path)) == item.path]
    return path, (own[-1] if own else line or 0) + 1


def refused(item: pytest.Item, raised: pytest.ExceptionInfo[BaseException]) -> bool:
    """True if the exception was raised by this package, not by a model, in a test that uses the plugin."""
    used = [name for name in MARKERS if item.get_closest_marker(name)]
    used += [name for name in getattr(item, "fixturenames", ()) if name in FIXTURES]
    return bool(used) and Path(__file__).parent in Path(str(raised.traceback[-1].path)).parents


def pytest_sessionfinish(session: pytest.Session) -> None:
    reports = session.config.stash.get(REPORTS, [])
    files = {kind: session.config.getoption(f"--parity-{kind}") for kind in FILES}
    if reports and any(files.values()):
        import parity

        try:
            parity.write(*reports, json=files["json"], junit=files["junit"], page=files["report"])
        except (OSError, ValueError) as error:  # a full disk, or a folder that is gone: the summary says so
            session.config.stash[UNWRITTEN] = str(error)
            session.exitstatus = pytest.ExitCode.INTERNAL_ERROR


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reports = config.stash.get(REPORTS, [])
    if reports:
        passed = sum(report.passed for report in reports)
        terminalreporter.write_line(f"parity: {passed} of {len(reports)} pairs agree")
    if unwritten := config.stash.get(UNWRITTEN, ""):
        from jaxmodels.process.texts import shortened

        terminalreporter.write_line(shortened(f"parity: the reports were not written: {unwritten}"), red=True)
