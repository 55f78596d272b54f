"""Reports of a pair that differs, with everything beside it: JUnit XML, JSON and the page."""

import dataclasses
import json
import math
import re
import xml.etree.ElementTree as ET

import pytest
from flax import nnx

import parity
from parity.charts import colour
from parity.files import write
from parity.report import Check, commit
from tests.parity.pairs import FlaxMLP, mlp


class WrongNorm(FlaxMLP):
    """Its norm has another epsilon, and what follows is wrong in consequence."""

    def __init__(self, *, rngs):
        super().__init__(rngs=rngs)
        self.norm.epsilon = 1e-2


@pytest.fixture(scope="module")
def report():
    torch_module, flax_module, x = mlp()
    wrong = WrongNorm(rngs=nnx.Rngs(0))
    found = parity.check(torch_module, wrong, x, steps=0, name="mlp <wrong>")
    swept = parity.sweep(torch_module, flax_module, x, dtypes=["float64", "bfloat16"])
    run = parity.trajectory(torch_module, wrong, x, optimizer="sgd", steps=3)
    only = Check("two runs: output", "float32", "output", 0.5, math.inf)
    return dataclasses.replace(
        found,
        checks=[*found.checks, *swept.checks, *run.checks(), only],
        sweep=swept,
        trajectories=(run,),
        skipped={"cached / full": "no cache"},
    )


@pytest.fixture(scope="module")
def files(report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    names = {"json": folder / "out.json", "junit": folder / "out.xml", "report": folder / "out.html"}
    write([report], **names)
    assert sorted(folder.iterdir()) == sorted(names.values()), "nothing is left beside them"
    return names


def test_json_holds_all_of_it(files, report):
    (found,) = json.loads(files["json"].read_text())
    assert not found["passed"]
    assert found["divergence"]["path"] == "norm"
    assert [row["dtype"] for row in found["sweep"]["rows"]] == ["float64", "bfloat16"]
    assert len(found["trajectories"][0]["readings"]) == 3 * 3
    assert found["checks"][-1]["limit"] == "inf"
    assert found["environment"] == report.environment
    assert re.fullmatch(r"none|[0-9a-f]{12}\+?", commit())


def test_junit_counts_and_names_what_failed(files, report):
    root = ET.parse(files["junit"]).getroot()
    (suite,) = root
    failed = [test.get("name") for test in suite.iter("testcase") if test.find("failure") is not None]
    assert failed == [f"{c.kind} ({c.precision})" for c in report.checks if not c.passed]
    assert root.get("failures") == suite.get("failures") == str(len(failed))
    assert root.get("tests") == str(len(report.checks) + 1) == str(len(list(suite.iter("testcase"))))
    assert [test.get("name") for test in suite.iter("testcase") if test.find("skipped") is not None] == [
        "cached / full"
    ]
    assert "first divergence: norm" in suite.find(".//failure").text
    assert {p.get("name") for p in suite.iter("property")} >= {"jax", "torch", "device", "seed", "git commit"}


def test_the_page_stands_alone_and_shows_where_they_part(files):
    html = files["report"].read_text()
    assert not re.search(r"(src|href)\s*=|url\(|@import|<script", html)
    assert "mlp &lt;wrong&gt;" in html
    assert html.count("<details") == html.count("</details>")
    tree = html[html.index('<div class="tree">') :]
    assert '<span class="tag culprit">culprit</span>' in tree
    assert "<details open>" in tree, "the way to the culprit is open"
    heat = html[html.index('<table class="heat">') :].partition("</table>")[0]
    assert all(f"<th>{dtype}</th>" in heat for dtype in ("float64", "bfloat16"))
    assert heat.count("<tr>") == 1 + 4  # the model, up, norm, down
    assert html.count("<svg") == 2 + 1  # a histogram for each dtype, and one trajectory
    assert "they part at step 0" in html
    assert "cached / full: not read, no cache" in html


def test_colours_count_roundings_of_the_dtype():
    assert colour(2.0**-7, "bfloat16") == colour(2.0**-52, "float64") == "hsl(140 60% 68%)"
    assert colour(1e-3, "float64") == "hsl(0 60% 68%)"
    assert colour(math.inf, "float32") == "hsl(0 75% 60%)"


def test_a_reading_without_a_limit_always_passes_and_says_no_limit():
    check = Check("two runs: output", "float32", "output", 0.5, math.inf)
    assert check.passed
    assert "at most" not in str(check)
