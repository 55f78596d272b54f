"""Files that no program imports: workflows, templates, the changelog, the citation, the Makefile."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import jaxmodels

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[1]
YAML = sorted([*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"])
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
MAKE = re.compile(r"\bmake ([a-z][a-z-]*)")


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


def steps(workflow) -> list[dict]:
    return [step for job in yaml.safe_load(workflow.read_text())["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("file", YAML, ids=lambda file: file.name)
def test_yaml_files_can_be_read(file):
    assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda file: file.stem)
def test_workflows_have_a_trigger_limited_permissions_and_pinned_actions(workflow):
    content = yaml.safe_load(workflow.read_text())
    assert content[True]  # YAML 1.1 reads the key `on` as a boolean
    assert content["permissions"] == {"contents": "read"}
    for job in content["jobs"].values():
        assert job["timeout-minutes"] <= 90
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert used
    assert all(re.search(r"@(v\d+|release/v\d+)$", action) for action in used)
    assert "secrets." not in workflow.read_text()


def test_commands_of_workflows_and_of_continuous_integration_are_targets_of_make():
    commands = [step["run"] for workflow in WORKFLOWS for step in steps(workflow) if "run" in step]
    found = [name for text in [*commands, (ROOT / ".ci/run").read_text()] for name in MAKE.findall(text)]
    assert {"lint", "test", "test-slow", "parity-golden"} <= set(found) <= targets()


def test_files_that_workflows_name_exist():
    text = " ".join(workflow.read_text() for workflow in WORKFLOWS)
    files = set(re.findall(r"[\w./-]+\.(?:py|toml|txt)\b", text))
    assert files >= {"pyproject.toml", "constraints.txt", "tests/test_docs.py", "jaxmodels/__init__.py"}
    assert all((ROOT / file).is_file() for file in files)


def test_the_released_wheel_is_tried_with_the_extra_that_its_commands_need():
    (script,) = (
        step["run"] for step in steps(ROOT / ".github/workflows/release.yml") if "--replay" in step.get("run", "")
    )
    assert re.search(r"pip install .*\.whl\)\[golden\]", script)


def test_make_alone_lists_every_target():
    done = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.findall(r"^make ([a-z-]+) ", done.stdout, re.M) == re.findall(
        r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M
    )
    assert done.stderr == ""


def test_the_version_is_the_same_everywhere():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == jaxmodels.__version__
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert headings[0] == jaxmodels.__version__
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]


def test_pre_commit_runs_the_ruff_of_the_constraints():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (rev,) = (repo["rev"] for repo in hooks if "ruff" in repo["repo"])
    assert f"ruff=={rev.removeprefix('v')}\n" in (ROOT / "constraints.txt").read_text()


def test_extras_that_messages_name_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    files = [file for package in ("jaxmodels", "parity", "train") for file in (ROOT / package).rglob("*.py")]
    text = "\n".join(file.read_text() for file in files)
    named = {extra for group in re.findall(r"jaxmodels\[([a-z,]+)\]", text) for extra in group.split(",")}
    named |= set(re.findall(r'require\("(\w+)"', text))
    assert {"torch", "train", "retro"} <= named
    assert named - {"extra"} <= project["optional-dependencies"].keys()


def test_promises_about_files_of_others_name_tests_that_exist():
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    named = [re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row) for row in rows]
    assert len(rows) > 15
    assert all(named)
    for file, name in (test for tests in named for test in tests):
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


def test_pinned_dependencies_are_audited_weekly_and_when_they_change():
    audit = yaml.safe_load((ROOT / ".github/workflows/audit.yml").read_text())
    assert audit[True]["schedule"]
    assert {"pyproject.toml", "constraints.txt"} <= set(audit[True]["pull_request"]["paths"])
