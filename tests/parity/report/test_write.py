"""Files of reports whose names hold any character, and merged stamps."""

import json
import xml.etree.ElementTree as ET

import pytest

import parity
from parity.command import main as parity_command
from parity.report.stamp import joined, software
from tests.parity.report.samples import HOSTILE, agreeing, hostile


def test_files_are_valid_whatever_a_name_holds(tmp_path):
    files = {"json": tmp_path / "out.json", "junit": tmp_path / "out.xml", "page": tmp_path / "out.html"}
    parity.write(hostile(), agreeing(), **files)
    (found, _) = json.loads(files["json"].read_text(encoding="utf-8"))
    assert found["name"] == HOSTILE, "JSON keeps every character"
    suite, _ = ET.parse(files["junit"]).getroot()
    shown = r"<b>&" + "\"'" + r"[red]\x00\x1b[31m\x07\r\n\t\x85\u202e\u2028\ud800\uffff</script>"
    assert suite.get("name") == shown
    assert {test.get("classname") for test in suite.iter("testcase")} == {shown}
    assert suite.find(".//skipped").get("message") == shown
    assert "[31m" in suite.find(".//failure").text
    assert suite.find(".//error").text.count("\n") == 1, "a traceback keeps its lines"
    assert files["page"].read_text(encoding="utf-8").startswith("<!doctype html>")


def test_merged_stamps_repeat_no_value_and_span_the_dates():
    first = {"date": "2031-02-03 04:05 UTC", "seed": "7", "jax": "0.10"}
    last = {"date": "2031-02-03 09:05 UTC", "seed": "11", "jax": "0.10"}
    merged = joined([last, first])
    assert merged == {"date": "2031-02-03 04:05 UTC to 2031-02-03 09:05 UTC", "seed": "11; 7", "jax": "0.10"}
    assert joined([merged, first, {"seed": "13"}]) == merged | {"seed": "11; 7; 13"}
    assert joined([first]) == first
    assert software()["date"].endswith(" UTC")


def test_two_reports_are_not_written_to_one_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^junit=.*one: json names the same file"):
        parity.write(agreeing(), json="one", junit=tmp_path / "one")
    (tmp_path / "folder").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="page=folder/one: json names the same file"):
        parity.write(agreeing(), json="one", page="folder/one")
    assert parity_command(["rope", "--json", "one", "--report", "./one"]) == 2
    assert not (tmp_path / "one").exists()
