"""Reports of a pair that differs: JSON, JUnit XML and the HTML page."""

import dataclasses
import json
import math
import re
import xml.etree.ElementTree as ET

import pytest
from flax import nnx

import parity
from parity.measure.precision import fast_path
from parity.report.page.charts import color
from parity.report.results import Check
from parity.report.stamp import commit
from tests.parity.pairs import FlaxMLP, mlp


class WrongNorm(FlaxMLP):
    """The norm has another epsilon, so everything after it differs."""

    def __init__(self, *, rngs):
        super().__init__(rngs=rngs)
        self.norm.epsilon = 1e-2


@pytest.fixture(scope="module")
def swept():
    return parity.sweep(*mlp(), dtypes=["float64", "bfloat16"], seed=1)


@pytest.fixture(scope="module")
def report(swept):
    torch_module, flax_module, x = mlp()
    wrong = WrongNorm(rngs=nnx.Rngs(0))
    return parity.Report.of(
        "mlp <wrong>",
        parity.check(torch_module, wrong, x, steps=0),
        swept,
        parity.trajectory(torch_module, wrong, x, optimizer="sgd", steps=3),
        parity.invariances(flax_module, x, only=["jit / no jit", "cached / full"]),
        fast_path(torch_module, wrong, x),
    )


@pytest.fixture(scope="module")
def files(report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    names = {"json": folder / "out.json", "junit": str(folder / "out.xml"), "page": folder / "out.html"}
    parity.write(report, **names)
    assert {str(file) for file in folder.iterdir()} == set(map(str, names.values())), "no temporary files are left"
    return names


def test_a_report_combines_all_results(report, swept):
    assert not report.passed
    assert {c.kind for c in report.checks} >= {
        *("round trip", "output", "sweep: output", "sgd: parameters", "jit / no jit", "two runs: output")
    }
    assert set(report.skipped) == {"cached / full"}
    assert report.seconds > swept.seconds > 0
    assert report.environment["seed"] == "0; 1"
    assert report.environment["jax"] == swept.environment["jax"]


def test_a_sweep_or_a_trajectory_alone_is_a_report(swept, tmp_path):
    one = parity.Report.of("swept", swept)
    bare = parity.Report.of("bare", parity.sweep(*mlp(), dtypes=["float32"], layers=False))
    two = parity.Report.of(
        "trained", parity.trajectory(*mlp(), steps=2), parity.trajectory(*mlp(), optimizer="sgd", steps=2)
    )
    parity.write(one, two, bare, json=tmp_path / "out.json", page=tmp_path / "out.html")
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(r["name"], r["passed"], r["divergence"]) for r in found] == [
        ("swept", True, None),
        ("trained", True, None),
        ("bare", True, None),
    ]
    assert [run["optimizer"] for run in found[1]["trajectories"]] == ["adam", "sgd"]
    html = (tmp_path / "out.html").read_text()
    assert html.count(">Error by sub-module and dtype</h3>") == 1, "only the first sweep has layers"
    assert "<dd>1; 0</dd>" in html, "both seeds"


def test_a_failing_trajectory_does_not_claim_that_all_sub_modules_agree():
    torch_module, _, x = mlp()
    run = parity.trajectory(torch_module, WrongNorm(rngs=nnx.Rngs(0)), x, steps=1)
    report = parity.Report.of("trained", run)
    with pytest.raises(AssertionError, match="trained: DIFFERS") as error:
        report.raise_if_failed()
    assert "all sub-modules agree" not in str(error.value)


def test_arguments_of_another_type_and_missing_folders_are_named(report, swept, tmp_path):
    with pytest.raises(ValueError, match=r"^reports.*\bnone\b"):
        parity.write(json=tmp_path / "out.json")
    with pytest.raises(ValueError, match=r"^reports.*\bSweep\b.*parity\.Report"):
        parity.write(report, swept, json=tmp_path / "out.json")
    with pytest.raises(ValueError, match=r"json=None.*junit=None.*page=None"):
        parity.write(report)
    with pytest.raises(ValueError, match=r"page=.*nowhere"):
        parity.write(report, json=tmp_path / "out.json", page=tmp_path / "nowhere" / "out.html")
    assert not list(tmp_path.iterdir()), "no file is written if one of them cannot be"
    with pytest.raises(ValueError, match=r"^results.*\btuple\b"):
        parity.Report.of("mlp", mlp())
    with pytest.raises(ValueError, match=r"^results.*\bnone\b"):
        parity.Report.of("mlp")
    with pytest.raises(ValueError, match=r"^results.*round trip \(bits\), output"):
        parity.Report.of("mlp", report, report)
    with pytest.raises(ValueError, match=r"^results.*\bsweep\b"):
        parity.Report.of("mlp", swept, dataclasses.replace(swept, checks=[]))


def test_json_has_every_result(files, report):
    (found,) = json.loads(files["json"].read_text())
    assert not found["passed"]
    assert found["divergence"]["path"] == "norm"
    assert [row["dtype"] for row in found["sweep"]["rows"]] == ["float64", "bfloat16"]
    assert len(found["trajectories"][0]["readings"]) == 3 * 3
    assert found["checks"][-1]["limit"] == "inf"
    assert found["environment"] == report.environment
    assert re.fullmatch(r"none|[0-9a-f]{12}\+?", commit())


def test_junit_counts_and_names_the_failures(files, report):
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


def test_the_page_is_self_contained_and_shows_the_first_divergence(files):
    html = files["page"].read_text()
    assert not re.search(r"(src|href)\s*=(?!\"#)|url\(|@import|<script", html)
    assert "mlp &lt;wrong&gt;" in html
    assert html.count("<details") == html.count("</details>")
    tree = html[html.index('<ul class="tree">') :].partition('<dl class="legend">')[0]
    assert '<span class="tag culprit">culprit</span>' in tree
    assert tree.count("<details open>") == 2, "the tree is open down to the culprit"
    heat = html[html.index('<table class="heat">') :].partition("</table>")[0]
    assert all(f'<th scope="col">{dtype}</th>' in heat for dtype in ("float64", "bfloat16"))
    assert heat.count("<tr>") == 1 + 4  # the model, up, norm, down
    assert html.count("<svg viewBox") == 2 + 1  # a histogram per dtype, and one trajectory
    assert "step 0: loss" in html
    assert "<li>cached / full: " in html


def test_colors_show_the_share_of_the_limit():
    assert color(0.0) == color(0.05) == "hsl(140 60% 68%)"
    assert color(1.0) == "hsl(80 60% 68%)"
    assert color(1.001) == "hsl(45 75% 68%)"
    assert color(1e4) == color(1e11) == "hsl(0 75% 68%)"
    assert color(math.inf) == "hsl(0 75% 60%)"


def test_a_check_without_a_limit_passes_and_prints_no_limit():
    check = Check("two runs: output", "float32", "output", 0.5, math.inf)
    assert check.passed
    assert "at most" not in str(check)
