"""Reports as JUnit XML for continuous integration: one test suite per report, one test per check."""

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from jaxmodels.process.texts import visible
from parity.report.columns import cells
from parity.report.report import Report


def junit(reports: Sequence[Report]) -> str:
    """JUnit XML of all reports.

    A check that exceeds its limit is a failure, with the first divergence as its text. An exception is an error.
    """
    root = ET.Element("testsuites", {"name": "parity"} | counts(reports))
    for report in reports:
        root.append(suite(report))
    for element in root.iter():  # XML has no control characters, not even as references
        element.attrib = {key: visible(value) for key, value in element.attrib.items()}
        element.text = visible(element.text, keep="\n") if element.text else None
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def counts(reports: Sequence[Report]) -> dict[str, str]:
    """Attributes of a suite: numbers of tests, failures, errors and skipped tests, and the time."""
    numbers = {
        "failures": sum(not check.passed for report in reports for check in report.checks),
        "errors": sum(report.error is not None for report in reports),
        "skipped": sum(len(report.skipped) for report in reports),
    }
    tests = sum(len(report.checks) for report in reports) + numbers["errors"] + numbers["skipped"]
    seconds = sum(report.seconds for report in reports)
    return {key: str(n) for key, n in ({"tests": tests} | numbers).items()} | {"time": f"{seconds:.3f}"}


def suite(report: Report) -> ET.Element:
    """One report: its stamp and columns as properties, its checks as tests."""
    element = ET.Element("testsuite", {"name": report.name} | counts([report]))
    properties = ET.SubElement(element, "properties")
    columns = {cell.column.title: cell.text for cell in cells(report.checks)}
    for name, value in (report.environment | columns).items():
        ET.SubElement(properties, "property", {"name": name, "value": value})
    divergence = str(report.divergence) if report.divergence else ""
    for check in report.checks:
        test = ET.SubElement(element, "testcase", attributes(report, f"{check.kind} ({check.precision})"))
        ET.SubElement(test, "system-out").text = str(check)
        if not check.passed:
            ET.SubElement(test, "failure", {"message": str(check).strip(), "type": "parity"}).text = divergence
    for kind, reason in report.skipped.items():
        test = ET.SubElement(element, "testcase", attributes(report, kind))
        ET.SubElement(test, "skipped", {"message": reason})
    if report.error:
        test = ET.SubElement(element, "testcase", attributes(report, "error"))
        error = {"message": report.error.message, "type": report.error.type}
        ET.SubElement(test, "error", error).text = report.error.traceback
    return element


def attributes(report: Report, name: str) -> dict[str, str]:
    """Attributes of a test. Its time is 0: only the time of a whole report is measured."""
    return {"classname": report.name, "name": name, "time": "0"}
