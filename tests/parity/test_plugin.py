"""The pytest plugin, run by pytest in another process."""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import parity
from tests.parity.pairs import mlp

ROOT = Path(__file__).parents[2]
PORT = """
import pytest
from flax import nnx
from tests.parity.pairs import FlaxMLP, mlp

class Wrong(FlaxMLP):
    def __call__(self, x):
        return super().__call__(x) * 1.001

@pytest.fixture
def pair():
    return mlp()

@pytest.mark.parity_case(steps=1)
def test_marked(pair):
    return pair

def test_fixture(parity_check):
    assert parity_check(*mlp(), steps=1).passed

@pytest.mark.parity_case(steps=0)
@pytest.mark.parity_sweep(dtypes=["float32"], layers=False)
@pytest.mark.parity_trajectory(optimizer="sgd", steps=2)
@pytest.mark.parity_invariances(batch_axis=0)
def test_all_of_it(pair):
    return pair

@pytest.mark.parity_invariances(only=["jit / no jit"])
def test_without_torch(pair):
    return pair[1:]

def test_fixtures(parity_sweep, parity_trajectory, parity_invariances):
    module, port, x = mlp()
    assert parity_sweep(module, port, x, dtypes=["float32"], layers=False).rows
    assert parity_trajectory(module, port, x, steps=2).losses
    with pytest.raises(AssertionError, match="test_fixtures: DIFFERS"):
        parity_trajectory(module, Wrong(rngs=nnx.Rngs(0)), x, steps=1)
    with pytest.raises(ValueError, match="only="):
        parity_invariances(port, x, only=["nothing"])

@pytest.mark.parity_case(golden="mlp")
def test_golden(pair):
    return pair[1]

@pytest.mark.parity_case(steps=0, memory_limit=0)
def test_wrong(pair):
    return pair[0], Wrong(rngs=nnx.Rngs(0)), pair[2]

@pytest.mark.parity_sweep()
def test_nothing():
    return None
"""


@pytest.fixture
def port(tmp_path):
    (tmp_path / "test_port.py").write_text(PORT)
    torch_module, _, x = mlp()
    parity.record(torch_module, x, tmp_path / "mlp")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "COLUMNS": "120"}

    def run(*arguments):
        command = [sys.executable, "-m", "pytest", "-p", "parity.plugin", "-q", "--strict-markers", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.mark.slow
def test_a_test_fails_if_its_pair_differs_and_every_report_is_written(port, tmp_path):
    files = ["--parity-json=out.json", "--parity-junit=out.xml", "--parity-report=out.html"]
    done = port(*files)
    assert done.returncode == 1
    assert "6 passed" in done.stdout
    assert "2 failed" in done.stdout
    assert "test_wrong: DIFFERS" in done.stdout
    assert re.search(r"ValueError: parity_sweep\b.*\bNoneType\b.*torch_module, flax_module,\s+inputs", done.stdout)
    assert "parity: 7 of 10 pairs agree" in done.stdout
    reports = json.loads((tmp_path / "out.json").read_text())
    assert [(report["name"], report["passed"]) for report in reports] == [
        ("test_marked", True),
        ("test_fixture", True),
        ("test_all_of_it", True),
        ("test_without_torch", True),
        *(("test_fixtures", passed) for passed in (True, True, False, False)),
        ("mlp", True),
        ("test_wrong", False),
    ]
    everything, (*_, unread) = reports[2], reports[4:8]
    assert {check["kind"] for check in everything["checks"]} >= {
        *("output", "sweep: output", "sgd: parameters", "jit / no jit", "accumulated / whole batch")
    }
    assert everything["sweep"]["rows"]
    assert everything["trajectories"][0]["optimizer"] == "sgd"
    assert unread["error"]["type"] == "ValueError"
    suites = {suite.get("name"): suite for suite in ET.parse(tmp_path / "out.xml").getroot()}
    assert suites["test_marked"].get("failures") == "0"
    assert int(suites["test_wrong"].get("failures")) > 0
    assert (suites["test_all_of_it"].get("failures"), suites["test_all_of_it"].get("errors")) == ("0", "0")
    assert "7 of 10 cases agree" in (tmp_path / "out.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("file", ["nowhere/out.json", ".", "/dev/full"])
def test_a_report_that_cannot_be_written_is_refused_before_any_test_runs(port, file):
    done = port(f"--parity-json={file}", "--collect-only")
    assert done.returncode == 4
    assert f"ERROR: --parity-json={file}: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_report_that_is_not_written_at_the_end_is_one_line(port, tmp_path):
    (tmp_path / "reports").mkdir()
    (tmp_path / "test_gone.py").write_text(
        "import os, parity\nfrom parity.plugin import REPORTS\n"
        "def test_it(request):\n    os.rmdir('reports')\n"
        "    request.config.stash[REPORTS].append(parity.Report.of('x', error=ValueError('bad')))\n"
    )
    done = port("--parity-json=reports/out.json", "test_gone.py")
    assert done.returncode == 3
    assert "1 passed" in done.stdout
    assert "parity: the reports were not written: json=reports/out.json: folder" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert "INTERNALERROR" not in done.stdout + done.stderr


def test_the_plugin_itself_loads_neither_torch_nor_jax():
    program = "import sys, parity.plugin; print({'torch', 'jax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
