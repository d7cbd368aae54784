"""``mthp conformance replay FILE...``: cases recorded on real kernels, replayed in the simulated machine."""

from __future__ import annotations

from typing import Any

import click

from mthp.cli.options import json_option
from mthp.cli.output import console, print_json, progress_bar, say
from mthp.sim.conformance import CaseReport, Replay, replay_case
from mthp.sim.golden import case_lines, parse_case

SHOWN_CASES = 20
"""Cases that do not agree and are printed; the JSON object has them all."""


@click.group("conformance")
def command() -> None:
    """Hold the simulated machine against what real kernels did."""


@command.command("replay")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(dir_okay=False))
@json_option
@click.pass_context
def replay_command(context: click.Context, files: tuple[str, ...], as_json: bool) -> None:
    """Replay the golden cases of each FILE (JSON lines, or the same with gzip).

    Every case's state is built in the simulated machine, its trigger is run, and the orders of all pages, the scan's
    result, the trace events, the counters and the contents are compared after each pass. Exit code 1 if any differ.
    """
    totals = Replay()
    out = console()
    for file in files:
        cases = case_lines(file)
        with progress_bar(file, hidden=as_json) as progress:
            for done, case in enumerate(cases, 1):
                report = replay_case(parse_case(case))
                totals.add(report)
                progress(done, len(cases))
                if report.mismatches and not as_json and len(totals.failed) <= SHOWN_CASES:
                    for line in _lines(report):
                        say(out, line)
    if as_json:
        print_json("conformance", replay_json(files, totals))
    else:
        if len(totals.failed) > SHOWN_CASES:
            say(out, f"and {len(totals.failed) - SHOWN_CASES} more cases, which --json prints")
        say(out, f"cases {totals.cases}, match {totals.matches}, mismatch {len(totals.failed)}")
    if totals.failed:
        context.exit(1)


def _lines(report: CaseReport) -> list[str]:
    """A case that does not agree, as text."""
    lines = [f"case {report.id}"]
    for mismatch in report.mismatches:
        lines += [
            f"  {mismatch.where}",
            f"    kernel:    {mismatch.expected or 'nothing'}",
            f"    simulated: {mismatch.got or 'nothing'}",
        ]
    return lines


def replay_json(files: tuple[str, ...], totals: Replay) -> dict[str, Any]:
    """A replay as the JSON object of the contract."""
    return {
        "files": list(files),
        "cases": totals.cases,
        "match": totals.matches,
        "mismatch": len(totals.failed),
        "mismatches": [
            {
                "case": report.id,
                "differences": [
                    {"where": mismatch.where, "expected": mismatch.expected, "got": mismatch.got}
                    for mismatch in report.mismatches
                ],
            }
            for report in totals.failed
        ],
    }
