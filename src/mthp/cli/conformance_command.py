"""``mthp conformance replay FILE...``: replay cases of real kernels in the simulated machine."""

from __future__ import annotations

import inspect
import traceback
from typing import Any

import click

from mthp.cli.options import json_option
from mthp.cli.render.output import console, print_json, progress_bar, say
from mthp.engine.policy import Policy
from mthp.engine.policy_lookup import policy_in_file, policy_named
from mthp.errors import UsageError
from mthp.sim.golden.cases import case_lines, parse_case
from mthp.sim.golden.conformance import APART, CaseReport, ReplayTotals, replay_case

SHOWN_CASES = 20
"""Differing cases that are printed; the JSON object has them all."""


@click.group("conformance")
def command() -> None:
    """Compare the simulated machine with recordings of real kernels."""


@command.command("replay")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(dir_okay=False))
@click.option(
    "--policy",
    metavar="NAME|FILE.py:CLASS",
    help="Replay with this policy; by default with that of each case's kernel or series.",
)
@json_option
@click.pass_context
def replay_command(context: click.Context, files: tuple[str, ...], policy: str | None, as_json: bool) -> None:
    """Replay the golden cases of each FILE (JSON lines, or the same with gzip).

    Every case's state is built in the simulated machine, its trigger is run, and the orders of all pages, the scan's
    result, the trace events, the counters and the contents are compared after each pass. Exit code 1 if any differ.
    Cases that depend on unrecorded state are counted apart, by name.
    """
    totals = ReplayTotals(files)
    chosen = None if policy is None else policy_in_file(policy) if ".py:" in policy else policy_named(policy)
    out = console()
    for file in files:
        cases = case_lines(file)
        with progress_bar(file, hidden=as_json) as progress:
            for done, case in enumerate(cases, 1):
                report = _replayed(parse_case(case), chosen)
                totals.add(report)
                progress(done, len(cases))
                if report.mismatches and not as_json and len(totals.failed) <= SHOWN_CASES:
                    for line in _lines(report):
                        say(out, line)
    if as_json:
        print_json("conformance", totals)
    else:
        if len(totals.failed) > SHOWN_CASES:
            say(out, f"and {len(totals.failed) - SHOWN_CASES} more cases, which --json prints")
        for name, ids in totals.apart.items():
            say(out, f"apart {len(ids)}, {name}: {APART[name]}")
        say(out, f"cases {totals.cases}, match {totals.matches}, mismatch {len(totals.failed)}")
    if totals.failed:
        context.exit(1)


def _replayed(case: dict[str, Any], policy: Policy | None) -> CaseReport:
    """Replay a case and return its report. Exceptions in a policy's file become an error with the line.

    Raises:
        UsageError: the case or the policy is at fault.
    """
    try:
        return replay_case(case, policy)
    except (ArithmeticError, AttributeError, LookupError, NameError, TypeError, ValueError) as error:
        if policy is None or (place := _place_in(policy, error)) is None:
            raise
        what = f"{type(error).__name__}: {error}"
        raise UsageError(f"policy {policy.name!r} failed at case {case['id']}: {what}", help=f"see {place}") from error


def _place_in(policy: Policy, error: Exception) -> str | None:
    """Return the line of the policy's own file in which `error` was raised; None if it was raised elsewhere."""
    # The innermost frame: code of mthp that a policy calls may be at fault itself.
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}, line {frame.lineno}" if frame.filename == inspect.getsourcefile(type(policy)) else None


def _lines(report: CaseReport) -> list[str]:
    """Return a case that differs, as text."""
    lines = [f"case {report.id}"]
    for mismatch in report.mismatches:
        lines += [
            f"  {mismatch.where}",
            f"    kernel:    {mismatch.expected or 'nothing'}",
            f"    simulated: {mismatch.got or 'nothing'}",
        ]
    return lines
