"""Reports as JUnit XML, which continuous integration shows: a suite per case, a test per reading."""

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from parity.report import Report


def junit(reports: Sequence[Report]) -> str:
    """The XML of all reports. A reading past its limit is a failure, whose text is where the models part."""
    tests = sum(len(report.checks) + len(report.skipped) for report in reports)
    failures = sum(not check.passed for report in reports for check in report.checks)
    skipped = sum(len(report.skipped) for report in reports)
    seconds = sum(report.seconds for report in reports)
    counts = {"tests": str(tests), "failures": str(failures), "skipped": str(skipped), "errors": "0"}
    root = ET.Element("testsuites", counts | {"name": "parity", "time": f"{seconds:.3f}"})
    for report in reports:
        root.append(suite(report))
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def suite(report: Report) -> ET.Element:
    failures = sum(not check.passed for check in report.checks)
    counts = {"tests": str(len(report.checks) + len(report.skipped)), "failures": str(failures), "errors": "0"}
    counts |= {"skipped": str(len(report.skipped)), "time": f"{report.seconds:.3f}"}
    element = ET.Element("testsuite", {"name": report.name} | counts)
    properties = ET.SubElement(element, "properties")
    for name, value in report.environment.items():
        ET.SubElement(properties, "property", {"name": name, "value": value})
    where = str(report.divergence) if report.divergence else ""
    for check in report.checks:
        test = ET.SubElement(element, "testcase", case_of(report, f"{check.kind} ({check.precision})"))
        ET.SubElement(test, "system-out").text = str(check)
        if not check.passed:
            ET.SubElement(test, "failure", {"message": str(check).strip(), "type": "parity"}).text = where
    for kind, why in report.skipped.items():
        test = ET.SubElement(element, "testcase", case_of(report, kind))
        ET.SubElement(test, "skipped", {"message": why})
    return element


def case_of(report: Report, name: str) -> dict[str, str]:
    """A reading takes no time of its own: the suite's is that of the whole case."""
    return {"classname": report.name, "name": name, "time": "0"}
