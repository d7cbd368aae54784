"""``mthp collapse TARGET``: carry out the plan, now, within a budget; say what came of it."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console

from mthp.addrspace import AddressSpace
from mthp.census import take_census
from mthp.cli.options import (
    json_option,
    percentage,
    plan_options,
    planned,
    share_or_size,
    stopping_on_signals,
    target_argument,
)
from mthp.cli.output import console, milliseconds, note, percent, print_json, progress_bar, say, table
from mthp.cli.plan_command import plan_json, print_plan
from mthp.collapsing import CollapseOptions, CollapseReport, collapse_space
from mthp.geometry import format_size, parse_size
from mthp.targets import open_target, refuse_ancestor


@click.command("collapse")
@target_argument
@plan_options
@click.option(
    "--mechanism",
    type=click.Choice(["auto", "madvise", "move"]),
    default="auto",
    show_default=True,
    help="The kernel's MADV_COLLAPSE, moving pages, or whichever fits the order.",
)
@click.option("--max-bloat", metavar="SIZE|%", help="Bytes, or share of what is resident, that filling may add.")
@click.option("--rate", metavar="SIZE", help="Bytes collapsed per second at most, such as 500M.")
@click.option("--min-coverage", metavar="%", help="Exit with 1 if less than this share is huge afterwards.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@json_option
def command(
    target: str,
    mechanism: Any,
    max_bloat: str | None,
    rate: str | None,
    min_coverage: str | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Collapse the memory of TARGET, now, as `mthp plan` says with the same options.

    TARGET is a PID, or the word self. The fullest PMD ranges come first. Ctrl-C ends it after the range at hand.
    """
    wanted = None if min_coverage is None else percentage(min_coverage)
    refuse_ancestor(target)
    with open_target(target) as space, stopping_on_signals() as stop:
        chosen = CollapseOptions(
            plan=planned(options),
            mechanism=mechanism,
            max_bloat=None if max_bloat is None else _bytes_of_bloat(max_bloat, space),
            rate=None if rate is None else parse_size(rate),
            dry_run=dry_run,
        )
        with progress_bar("collapsing", hidden=as_json) as progress:
            report = collapse_space(space, chosen, progress, stop)
    covered = wanted is None or _coverage(report) >= wanted
    if as_json:
        print_json("collapse", report_json(report) | {"min_coverage": wanted, "min_coverage_reached": covered})
    else:
        print_report(console(), report, wanted)
    return 4 if report.vanished else 0 if report.complete and covered else 1


def _bytes_of_bloat(text: str, space: AddressSpace) -> int:
    """The budget that `text` says, of what is resident now where it is a share."""
    share, size = share_or_size(text)
    if size is not None:
        return size
    assert share is not None
    return int(share * take_census(space).total.resident * space.geometry.page_size)


def _coverage(report: CollapseReport) -> float:
    return report.plan.coverage_after if report.dry_run else report.coverage


def print_report(out: Console, report: CollapseReport, wanted: float | None = None) -> None:
    """Print what a collapse did."""
    plan, geometry = report.plan, report.plan.geometry
    if report.dry_run:
        print_plan(out, plan)
        note(out, ["dry run: nothing was changed"])
        return
    pmd = geometry.label(geometry.pmd_order)
    rows = [["collapsed", str(report.collapsed), f"{format_size(report.collapsed_bytes)} are mapped as {pmd} now"]]
    if report.unchanged:
        rows.append(["huge already", str(report.unchanged), "nothing to do"])
    rows += [[result.name, str(count), result.meaning] for result, count in report.failed.most_common()]
    if report.over_budget:
        rows.append(["over budget", str(report.over_budget), "filling them would exceed --max-bloat"])
    if report.not_tried:
        rows.append(["not tried", str(report.not_tried), "it ended early"])
    out.print(table(f"{plan.label}: PMD ranges of {pmd}", ["outcome", "ranges", "meaning"], rows, right={1}))
    if report.needs_move:
        moves = [[geometry.label(order), str(count)] for order, count in report.needs_move.items()]
        out.print(
            table("Folios below the PMD size: these need the move mechanism", ["size", "folios"], moves, right={1})
        )
    times = report.durations
    speed = report.collapsed_bytes / report.elapsed if report.elapsed else 0.0
    out.print()
    say(
        out,
        f"copied {format_size(report.copied_bytes)}, added {format_size(report.filled_bytes)} of bloat,"
        f" in {report.elapsed:.2f} s ({format_size(int(speed))}/s);"
        f" share of {pmd} mappings {percent(plan.coverage)} -> {percent(report.coverage)}",
    )
    say(
        out,
        f"pauses at most (duration of each of {times.count} calls): p50 {milliseconds(times.p50)},"
        f" p99 {milliseconds(times.p99)}, max {milliseconds(times.max)}",
    )
    note(out, _remarks(report, wanted))


def _remarks(report: CollapseReport, wanted: float | None) -> list[str]:
    remarks = []
    if report.interrupted:
        remarks.append("interrupted: what was done stays done")
    if report.vanished:
        remarks.append("the target exited meanwhile")
    if wanted is not None and report.coverage < wanted:
        remarks.append(f"{percent(report.coverage)} is less than the {percent(wanted)} that --min-coverage asks for")
    return remarks


def report_json(report: CollapseReport) -> dict[str, Any]:
    """A report as the JSON object of the contract."""
    times = report.durations
    return {
        "plan": plan_json(report.plan),
        "dry_run": report.dry_run,
        "complete": report.complete,
        "collapsed_ranges": report.collapsed,
        "collapsed_bytes": report.collapsed_bytes,
        "unchanged_ranges": report.unchanged,
        "failed_ranges": {result.name: count for result, count in report.failed.items()},
        "over_budget_ranges": report.over_budget,
        "not_tried_ranges": report.not_tried,
        "needs_move_folios": {str(order): count for order, count in report.needs_move.items()},
        "copied_bytes": report.copied_bytes,
        "bloat_bytes": report.filled_bytes,
        "seconds": report.elapsed,
        "pauses": {
            "calls": times.count,
            "p50_seconds": times.p50,
            "p99_seconds": times.p99,
            "max_seconds": times.max,
            "total_seconds": times.total,
        },
        "coverage_before": report.plan.coverage,
        "coverage": report.coverage,
        "interrupted": report.interrupted,
        "vanished": report.vanished,
    }
