"""Reports as JUnit XML, which continuous integration shows: a suite per case, a test per reading."""

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from parity.report.report import Report


def junit(reports: Sequence[Report]) -> str:
    """The XML of all reports.

    A reading past its limit is a failure, whose text is where the models part; what was raised is an error.
    """
    root = ET.Element("testsuites", {"name": "parity"} | counts(reports))
    for report in reports:
        root.append(suite(report))
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def counts(reports: Sequence[Report]) -> dict[str, str]:
    """How many tests there are, and how they ended."""
    numbers = {
        "failures": sum(not check.passed for report in reports for check in report.checks),
        "errors": sum(report.error is not None for report in reports),
        "skipped": sum(len(report.skipped) for report in reports),
    }
    tests = sum(len(report.checks) for report in reports) + numbers["errors"] + numbers["skipped"]
    seconds = sum(report.seconds for report in reports)
    return {key: str(n) for key, n in ({"tests": tests} | numbers).items()} | {"time": f"{seconds:.3f}"}


def suite(report: Report) -> ET.Element:
    element = ET.Element("testsuite", {"name": report.name} | counts([report]))
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
    if report.error:
        test = ET.SubElement(element, "testcase", case_of(report, "error"))
        about = {"message": report.error.message, "type": report.error.type}
        ET.SubElement(test, "error", about).text = report.error.traceback
    return element


def case_of(report: Report, name: str) -> dict[str, str]:
    """A reading takes no time of its own: the suite's is that of the whole case."""
    return {"classname": report.name, "name": name, "time": "0"}
