"""A plugin of pytest that runs in a guest (``-p vm.telling``), and sends the tests to the host.

It sends an object when a test begins (``{"test": ...}``) and when it has ended (with ``outcome``, ``seconds``, what the
test ``said``, and, if it did not pass, ``why``). Tests that the file ``/job/done`` names are left out.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from vm.port import Port

DONE = Path("/job/done")
"""Names of tests that are not to be run, one a line: earlier guests have."""

WHY = 3000
"""Characters of a failure or of a test's output that are sent, from the end, which matters most."""


class Telling:
    """The plugin."""

    def __init__(self, port: Port) -> None:
        self._port = port
        self._outcome, self._seconds, self._why = "passed", 0.0, ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        done = set(DONE.read_text().splitlines()) if DONE.exists() else set()
        items[:] = [item for item in items if item.nodeid not in done]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self._port.tell(test=report.nodeid, outcome=report.outcome, seconds=0, why=_why(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._outcome, self._seconds, self._why = "passed", 0.0, ""
        self._port.tell(test=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds += report.duration
        if report.outcome != "passed" and self._outcome != "failed":
            self._outcome, self._why = report.outcome, _why(report)
        if report.when == "teardown":
            said = report.capstdout.strip()[-WHY:]
            self._port.tell(test=report.nodeid, outcome=self._outcome, seconds=self._seconds, why=self._why, said=said)


def pytest_configure(config: pytest.Config) -> None:
    """Called by pytest."""
    config.pluginmanager.register(Telling(Port()))


def _why(report: pytest.CollectReport | pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return str(report.longreprtext)[-WHY:]
