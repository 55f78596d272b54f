"""A pytest plugin: a port's own suite gets the whole harness in one line.

    @pytest.mark.parity_case(half=["bfloat16"])        # the arguments of parity.check, or golden="fixtures/mlp"
    def test_port():
        return TorchMLP(), FlaxMLP(rngs=nnx.Rngs(0)), {"x": x}

    def test_port(parity_check):
        parity_check(TorchMLP(), FlaxMLP(rngs=nnx.Rngs(0)), {"x": x})

A test fails with the report that says where the models part. `--parity-report FILE.html`, `--parity-json` and
`--parity-junit` write the readings of all of them; `--parity-device` says where Flax runs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPORTS = pytest.StashKey[list]()
FILES = {"report": "one self-contained HTML page", "json": "JSON", "junit": "JUnit XML"}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("parity", "Flax models against PyTorch")
    for kind, text in FILES.items():
        group.addoption(f"--parity-{kind}", type=Path, metavar="FILE", help=f"write all readings as {text}")
    group.addoption("--parity-device", choices=["cpu", "gpu", "tpu"], help="where Flax runs (default: JAX's default)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "parity_case(golden=None, **arguments): the test returns (torch_module, flax_module, inputs), which "
        "parity.check judges with the arguments; with golden, a fixture's path, it returns the Flax module alone",
    )
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
    """Runs a marked test and judges what it returns."""
    marker = pyfuncitem.get_closest_marker("parity_case")
    if marker is None:
        return None
    names = pyfuncitem._fixtureinfo.argnames
    made = pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names})
    judge(pyfuncitem, made, dict(marker.kwargs))
    return True


def judge(item: pytest.Item, made: Any, arguments: dict[str, Any]) -> Any:
    """The report of a pair, or of a Flax module against a fixture; raises AssertionError where it differs."""
    import parity

    golden = arguments.pop("golden", None)
    arguments.setdefault("device", item.config.getoption("--parity-device"))
    if golden is not None:
        report = parity.replay(made, item.path.parent / golden, **arguments)
    elif isinstance(made, tuple | list) and len(made) == 3:
        report = parity.check(*made, **{"name": item.name} | arguments)
    else:
        raise ValueError(f"a parity_case returns (torch_module, flax_module, inputs), not {type(made).__name__}")
    item.config.stash[REPORTS].append(report)
    report.raise_if_failed()
    return report


@pytest.fixture
def parity_check(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`parity.check`, which fails the test where the models differ, and whose reading is in the run's report."""

    def check(torch_module: Any, flax_module: Any, inputs: Any, **arguments: Any) -> Any:
        return judge(request.node, (torch_module, flax_module, inputs), arguments)

    return check


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
