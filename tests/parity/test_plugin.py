"""The pytest plugin, in a pytest of its own."""

import json
import os
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

@pytest.mark.parity_case(golden="mlp")
def test_golden(pair):
    return pair[1]

@pytest.mark.parity_case(steps=0, memory_limit=0)
def test_wrong(pair):
    return pair[0], Wrong(rngs=nnx.Rngs(0)), pair[2]

@pytest.mark.parity_case()
def test_nothing():
    return None
"""


@pytest.fixture
def port(tmp_path):
    (tmp_path / "test_port.py").write_text(PORT)
    torch_module, _, x = mlp()
    parity.record(torch_module, x, tmp_path / "mlp")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}

    def run(*arguments):
        command = [sys.executable, "-m", "pytest", "-p", "parity.plugin", "-q", "--strict-markers", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


def test_a_ports_own_suite_fails_where_it_differs_and_writes_every_report(port, tmp_path):
    files = ["--parity-json=out.json", "--parity-junit=out.xml", "--parity-report=out.html"]
    done = port(*files)
    assert done.returncode == 1
    assert "3 passed" in done.stdout
    assert "2 failed" in done.stdout
    assert "test_wrong: DIFFERS" in done.stdout
    assert "not NoneType" in done.stdout
    assert "parity: 3 of 4 pairs agree" in done.stdout
    reports = json.loads((tmp_path / "out.json").read_text())
    assert {report["name"]: report["passed"] for report in reports} == {
        "test_marked": True,
        "test_fixture": True,
        "mlp": True,
        "test_wrong": False,
    }
    suites = {suite.get("name"): suite for suite in ET.parse(tmp_path / "out.xml").getroot()}
    assert suites["test_marked"].get("failures") == "0"
    assert int(suites["test_wrong"].get("failures")) > 0
    assert "3 of 4 cases agree" in (tmp_path / "out.html").read_text()


def test_a_report_that_cannot_be_written_is_said_at_once(port):
    done = port("--parity-json=nowhere/out.json", "--collect-only")
    assert done.returncode == 4
    assert "nowhere" in done.stderr


def test_the_plugin_itself_loads_neither_torch_nor_jax():
    program = "import sys, parity.plugin; print({'torch', 'jax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
