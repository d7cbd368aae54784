"""mthp on each kernel: what `doctor` says there, the commands on a workload, and the live tests, as a table.

The live tests run as on any machine: what a kernel does not offer is skipped with the reason. The commands are run on
a target that checks its own contents (`smoke.py`), and what became of it is read from the guest's own page tables.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path

from vm.guest import Job, Outcome, run
from vm.kernels import Kernel

LIVE = Path(__file__).resolve().parents[1] / "live"

CELL = 32
"""Characters in a cell of the table."""

_SETUP = "cd /mthp; export PYTHONPATH=/mthp/src:/mthp/tests PYTHONUNBUFFERED=1 TERM=dumb COLUMNS=140\n"


@dataclass
class Result:
    """What came of one test file on a kernel.

    Attributes:
        passed, failed, skipped: tests.
        failures: the names of those that failed.
    """

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def cell(self) -> str:
        """For a table."""
        parts = [f"{self.passed} ok"] if self.passed else []
        parts += [f"{self.failed} FAILED"] if self.failed else []
        parts += [f"{self.skipped} skip"] if self.skipped else []
        return ", ".join(parts) or "-"


@dataclass
class Row:
    """What came of a kernel.

    Attributes:
        kernel: which.
        smoke: what the commands did: a word of `smoke.py`'s report, by command.
        tests: by test file.
        seconds: how long it took.
        console: the end of what the guest printed.
    """

    kernel: Kernel
    smoke: dict[str, str] = field(default_factory=dict)
    tests: dict[str, Result] = field(default_factory=dict)
    seconds: float = 0
    console: str = ""

    @property
    def failed(self) -> bool:
        """Whether anything did."""
        return any(result.failed for result in self.tests.values()) or not self.smoke or "FAILED" in str(self.smoke)


def live_files(chosen: tuple[str, ...] = ()) -> list[str]:
    """The live tests' files, or those of them whose names hold one of the words `chosen`."""
    names = sorted(path.name for path in LIVE.glob("test_*.py"))
    return [name for name in names if not chosen or any(word in name for word in chosen)]


def examine(kernel: Kernel, files: list[str], *, seconds: float, echo: bool = False) -> Row:
    """Run the commands and the live tests `files` on a kernel, for at most so many `seconds`."""
    script = _SETUP + "python3 -m vm.smoke /out/smoke.json; smoke=$?\n"
    for name in files:
        # A file of its own for each, so that what a time limit cuts off is the rest and not all.
        script += f"python3 -m pytest -q -p no:cacheprovider --junitxml=/out/{name}.xml tests/live/{name}\n"
        script += f"echo $? >/out/{name}.rc\n"
    outcome = run(kernel, Job(script + "exit $smoke", seconds=seconds, memory_mb=2048, with_python=True), echo=echo)
    return _row(kernel, files, outcome)


def _row(kernel: Kernel, files: list[str], outcome: Outcome) -> Row:
    row = Row(kernel, seconds=outcome.seconds, console=outcome.console[-4000:])
    if report := outcome.files.get("smoke.json"):
        row.smoke = json.loads(report)
    for name in files:
        if f"{name}.xml" in outcome.files:
            row.tests[name] = _result(outcome.files[f"{name}.xml"])
        else:
            row.tests[name] = Result(failed=1, failures=[f"{name}: did not come to an end"])
    return row


def _result(xml: bytes) -> Result:
    result = Result()
    for case in ET.fromstring(xml).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            result.failed += 1
            result.failures.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in kinds:
            result.skipped += 1
        else:
            result.passed += 1
    return result


def table(rows: list[Row]) -> str:
    """The kernels by what was run, as text."""
    titles = ["", *(f"{row.kernel.version} {row.kernel.platform.name}" for row in rows)]
    lines = [titles]
    for command in dict.fromkeys(name for row in rows for name in row.smoke):
        lines.append([f"mthp {command}", *(_short(row.smoke.get(command, "-")) for row in rows)])
    for name in dict.fromkeys(name for row in rows for name in row.tests):
        lines.append([name, *(row.tests[name].cell if name in row.tests else "-" for row in rows)])
    lines.append(["seconds", *(f"{row.seconds:.0f}" for row in rows)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _short(text: str) -> str:
    """A sentence for a cell; what is longer is said beside the table."""
    text = " ".join(text.split())
    return text if len(text) <= CELL else "FAILED" if text.startswith("FAILED") else f"{text[: CELL - 3]}..."
