"""``mthp verify TARGET --expect '2M>=95%'``: check that memory lies in folios as expected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

import click

from mthp.cli.options import at_option, json_option
from mthp.cli.render.output import print_json, progress_bar
from mthp.cli.render.tables import Table
from mthp.cli.several import Each, Failed, do_each, print_each, targets_argument
from mthp.engine.verify import Checked, Expectation, Verification, verify_space
from mthp.errors import MthpError, UsageError
from mthp.geometry import Geometry
from mthp.metrics import out_of_reach_remark
from mthp.targets import Found, find_targets
from mthp.text import clean, numbered
from mthp.units import format_size, percent


@dataclass(frozen=True, slots=True)
class Verifications:
    """The results of the expectations of several targets.

    Attributes:
        targets: the checks of each, or its error.
        passed: whether all expectations of all targets are met.
    """

    targets: tuple[Verification | Failed, ...]
    passed: bool


@click.command("verify")
@targets_argument
@click.option(
    "--expect",
    "expected",
    multiple=True,
    required=True,
    metavar="[MAPPING:]SIZE>=SHARE",
    help="2M>=95% of the anonymous memory; heap:64K>=90% of a mapping, by its name, an address in it, or guest-ram.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "junit", "nagios"]),
    default="table",
    show_default=True,
    help="JUnit XML for a pipeline; one line with performance data for Nagios and its like.",
)
@at_option
@json_option
def command(targets: tuple[str, ...], expected: tuple[str, ...], form: str, as_json: bool, at: str | None) -> int:
    """Check that the memory of each TARGET lies in folios as expected. Exits with 1 if it does not.

    A TARGET is a PID, the word self, a snapshot or recording, or a name as `mthp --help` lists them. Only memory that
    the hardware can use counts: the PMD size by a PMD entry, smaller sizes as whole, aligned, contiguous blocks.
    """
    if as_json and form != "table":
        raise UsageError(f"both --json and --format {form}", help="use one of them")
    hidden = as_json or form != "table"

    def verified() -> Each[Verification]:
        expectations = [Expectation.parse(each) for each in expected]

        def work(found: Found) -> tuple[Verification, int]:
            with found.open(at=at) as space, progress_bar(f"verifying {found.label}", hidden=hidden) as progress:
                done = verify_space(space, expectations, progress)
            return done, done.exit_code

        return do_each(find_targets(targets), work)

    if form == "nagios":
        return _nagios(verified)
    each = verified()
    if as_json and each.single:
        print_json("verify", *each.done)
    elif as_json:
        print_json("verify", Verifications(each.all, not each.code))
    elif form == "junit":
        click.echo(_junit(each))
    else:
        missing = sorted({line for done in each.done for line in done.missing})
        print_each(each, checks_table(each), [*_out_of_reach(each.done), *missing])
    return each.code


def _out_of_reach(done: Sequence[Verification]) -> list[str]:
    """Return a sentence for each geometry on the memory that no kernel collapses."""
    sums = Counter[Geometry]()
    for each in done:
        sums[each.geometry] += each.out_of_reach_bytes
    return [out_of_reach_remark(size, geometry) for geometry, size in sums.items()]


def checks_table(each: Each[Verification]) -> Table:
    """Return a table with a line for each target and expectation, and their sum over several targets."""
    columns = ["target", "expectation", "resident", "share", "verdict", "reason"]
    rows = []
    for _, result in each.results:
        if isinstance(result, Failed):
            rows.append([result.label, "", "", "", "", result.error.message])
            continue
        rows += [
            [
                result.label,
                check.expectation,
                format_size(check.resident_bytes),
                "" if check.share is None else percent(check.share),
                check.verdict,
                check.reason,
            ]
            for check in result.checks
        ]
    if len(each.done) > 1:
        rows += [_sum(checks) for checks in zip(*(done.checks for done in each.done), strict=True)]
    return Table("Memory in folios of a size or larger ones", columns, rows, right={2, 3}, names={0})


def _sum(checks: Sequence[Checked]) -> list[str]:
    """Return the line of one expectation of all targets."""
    resident = sum(check.resident_bytes for check in checks)
    covered = sum((check.share or 0.0) * check.resident_bytes for check in checks)
    passed = sum(check.verdict == "passed" for check in checks)
    share = percent(covered / resident) if resident else ""
    return ["in all", checks[0].expectation, format_size(resident), share, f"{passed} of {len(checks)} passed", ""]


def _junit(each: Each[Verification]) -> str:
    """Return a test suite of JUnit: a case for each target and expectation."""
    suite = ElementTree.Element("testsuite", name="mthp verify")
    counts = {"tests": 0, "failures": 0, "errors": 0}
    for _, result in each.results:
        if isinstance(result, Failed):
            # XML has no control characters, escaped or not.
            case = ElementTree.SubElement(suite, "testcase", classname=clean(result.label), name="verify")
            ElementTree.SubElement(case, "error", message=clean(result.error.message))
            counts["tests"] += 1
            counts["errors"] += 1
            continue
        for check in result.checks:
            case = ElementTree.SubElement(
                suite, "testcase", classname=clean(result.label), name=clean(check.expectation)
            )
            counts["tests"] += 1
            if check.verdict != "passed":
                word = "failure" if check.verdict == "failed" else "error"
                ElementTree.SubElement(case, word, message=clean(check.reason))
                counts[f"{word}s"] += 1
    suite.attrib.update({name: str(count) for name, count in counts.items()})
    ElementTree.indent(suite)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ElementTree.tostring(suite, encoding="unicode")}'


_STATES = {0: "OK", 1: "WARNING"}
"""Meaning of a plugin's exit code in Nagios; 3 is UNKNOWN."""


def _nagios(verified: Callable[[], Each[Verification]]) -> int:
    """Print the one line of a Nagios plugin, and return its exit code.

    In Nagios 2 is CRITICAL, so an expectation that cannot be read is UNKNOWN, too.
    """
    try:
        each = verified()
    except MthpError as error:
        click.echo(f"MTHP UNKNOWN - {_plain(error.message)}")
        return 3
    code = each.code if each.code in _STATES else 3
    checks = [(done.label, check) for done in each.done for check in done.checks]
    findings = [f"{label} {check.expectation}: {check.reason}" for label, check in checks if check.reason]
    findings += [f"{failed.label}: {failed.error.message}" for failed in each.all if isinstance(failed, Failed)]
    if any(check.verdict == "unknown" for _, check in checks):
        findings += sorted({line for done in each.done for line in done.missing})
    findings = findings or [f"{numbered(len(checks), 'expectation')} met"]
    data = " ".join(_performance(label, check) for label, check in checks if check.share is not None)
    click.echo(f"MTHP {_STATES.get(code, 'UNKNOWN')} - {'; '.join(map(_plain, findings))}{' | ' if data else ''}{data}")
    return code


def _plain(text: str) -> str:
    """Return a text without characters that end a line or begin the performance data."""
    return clean(text).replace("|", "/")


def _performance(label: str, check: Checked) -> str:
    # A label must have neither of these characters (Nagios plugin guidelines, performance data).
    name = f"{label} {check.mapping}{':' if check.mapping else ''}{check.size}".replace("'", "").replace("=", "-")
    assert check.share is not None
    # Value, range without a warning, no critical range, least and most. Below the expected share it warns.
    return f"'{_plain(name)}'={100 * check.share:.2f}%;{100 * check.least:g}:;;0;100"
