"""The result of a collapse, as tables and remarks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console

from mthp.cli.render.output import milliseconds, note, say
from mthp.cli.render.planned import (
    left_table,
    print_allowed,
    print_plan,
    scope_name,
    size_and_more,
)
from mthp.cli.render.tables import Table
from mthp.engine.report import CollapseReport, FolioTally
from mthp.means import needs_move_reason
from mthp.metrics import Durations, out_of_reach_remark
from mthp.results import ScanResult
from mthp.text import numbered
from mthp.units import format_size, percent

MAX_REASONS = 5
"""Most reasons for an idle run that are printed as remarks; the table has more."""


def print_report(
    out: Console, report: CollapseReport, wanted: float | None = None, refusals: Sequence[str] = ()
) -> None:
    """Print the result of a collapse."""
    if report.dry_run:
        print_plan(out, report.plan)
        _print_mechanisms(out, report)
        if report.allowed is not None:
            print_allowed(out, report.plan, report.allowed)
        price = report.split_price.remark(report.geometry)
        refused = [f"the mover would not begin: {reason}" for reason in refusals]
        outside = report.plan.out_of_reach_bytes
        reach = out_of_reach_remark(outside, report.geometry, recommend=not report.plan.small)
        note(out, [price, reach, *refused, "dry run: nothing was changed"])
        return
    # Tables of outcomes would have nothing to show.
    if report.done_nothing or report.plan.finished:
        out.print(coverage_table(report))
        out.print(left_table(report.plan))
        note(out, _remarks(report, wanted))
        return
    _print_ranges(out, report)
    if report.folios:
        _print_folios(out, report)
    if report.needs_move:
        why = needs_move_reason(report.move_price)
        moves = [[report.plan.geometry.label(order), str(count), why] for order, count in report.needs_move.items()]
        out.print(Table("Folios not made", ["size", "folios", "reason"], moves, right={1}))
    out.print(coverage_table(report))
    if report.plan.left:
        out.print(left_table(report.plan))
    _print_sums(out, report)
    note(out, _remarks(report, wanted))


def _print_mechanisms(out: Console, report: CollapseReport) -> None:
    """Print the mechanism for each size."""
    geometry = report.plan.geometry
    meanings = {
        "madvise": "MADV_COLLAPSE: nothing is written into the process, and it is not stopped",
        "split": "MADV_COLLAPSE, then splits: nothing is written into the process, and it is not stopped",
        "move": "the mover: the process is stopped repeatedly (--max-pause, --pause-share)",
        "khugepaged": "the kernel's own khugepaged: switches change for the whole system meanwhile",
        None: needs_move_reason(report.move_price),
    }
    rows = [[geometry.label(order), by or "none", meanings[by]] for order, by in report.mechanisms.items()]
    if rows:
        out.print(Table("Mechanisms", ["size", "mechanism", "meaning"], rows))


def _print_ranges(out: Console, report: CollapseReport) -> None:
    geometry = report.plan.geometry
    pmd = geometry.label(geometry.pmd_order)
    rows = [
        ["collapsed", str(report.ranges.made), f"{format_size(report.collapsed_bytes)} are mapped as {pmd} now"],
        *_unchanged(report.ranges, "huge already"),
        *([result.name, str(count), result.meaning] for result, count in report.ranges.failed_by_result.most_common()),
        *_left_alone(report, report.ranges),
    ]
    out.print(Table(f"{report.plan.label}: PMD ranges of {pmd}", ["outcome", "ranges", "meaning"], rows, right={1}))


def _print_folios(out: Console, report: CollapseReport) -> None:
    geometry = report.plan.geometry
    rows = []
    for order, tally in report.folios.items():
        size = geometry.label(order)
        made = f"{format_size(tally.made * geometry.size_of(order))} lie in folios of {size} now"
        rows.append([size, "made", str(tally.made), made + (", verified" if report.verified else "")])
        failed = ([result.name, str(count), reason] for (result, reason), count in tally.failed.most_common())
        others = (*_unchanged(tally, "large already"), *failed, *_left_alone(report, tally))
        rows += [[size, *row] for row in others]
    title = f"{report.plan.label}: folios below {geometry.label(geometry.pmd_order)}"
    out.print(Table(title, ["size", "outcome", "folios", "meaning"], rows, right={2}))


def _unchanged(tally: FolioTally, name: str) -> list[list[str]]:
    return [[name, str(tally.unchanged), "nothing to do"]] if tally.unchanged else []


def _left_alone(report: CollapseReport, tally: FolioTally) -> list[list[str]]:
    """Return a row for every reason for which folios were not tried."""
    rows = (
        ("over budget", tally.over_budget, "filling them would exceed --max-bloat"),
        ("over budget", tally.over_copied, "copying them would exceed --max-copied"),
        ("no room", tally.over_reserve, f"{report.room}: --reserve"),
        ("not tried", tally.not_tried, "the collapse ended early"),
    )
    return [[name, str(count), meaning] for name, count, meaning in rows if count]


def coverage_table(report: CollapseReport) -> Table:
    """Return the coverage before and after, for every requested size, and for the PMD size."""
    plan, geometry = report.plan, report.plan.geometry
    orders = sorted({*plan.orders, plan.coverage_order, geometry.pmd_order}, reverse=True)
    rows = [
        [
            geometry.label(order) + ("" if order == geometry.pmd_order else " and more"),
            percent(report.before.share(order)),
            percent(report.after.share(order)),
        ]
        for order in orders
    ]
    page = geometry.page_size
    before, after = (format_size(each.resident * page) for each in (report.before, report.after))
    title = f"Share {scope_name(plan)}, {before} before and {after} after, that is mapped as"
    return Table(title, ["size", "before", "after"], rows, right={1, 2})


def _print_sums(out: Console, report: CollapseReport) -> None:
    times, windows = report.durations, report.windows
    speed = (report.collapsed_bytes + report.moved_bytes) / report.elapsed if report.elapsed else 0.0
    out.print()
    say(
        out,
        f"copied {format_size(report.copied_bytes)}, added {format_size(report.filled_bytes)} of bloat,"
        f" in {report.elapsed:.2f} s ({format_size(int(speed))}/s)",
    )
    if report.heat_share is not None:
        say(out, f"{percent(report.heat_share)} of the observed accesses go to the collapsed memory")
    # None if only the mover was at work, or nothing was tried.
    if times.count:
        say(out, f"{numbered(times.count, 'call')}: {_spread(times)}")
    if windows.count:
        each = report.moved_blocks / windows.count
        say(out, f"{windows.count} pauses, of {each:.1f} folios each: {_spread(windows)}")


def _spread(times: Durations) -> str:
    return f"p50 {milliseconds(times.p50)}, p99 {milliseconds(times.p99)}, max {milliseconds(times.max)}"


def reason_of(report: CollapseReport) -> str:
    """Return in a few words why not all of a plan was done; ``""`` if it was."""
    remarks = _remarks(report, None) if report.done_nothing or report.ended_early else []
    if remarks:
        return remarks[0]
    failed: Counter[str] = Counter()
    for tally in (report.ranges, *report.folios.values()):
        failed.update({result.name: count for result, count in tally.failed_by_result.items()})
        failed.update({"over budget": tally.over_budget, "no room": tally.over_reserve})
    failed["made by the mover only"] = sum(report.needs_move.values())
    return ", ".join(f"{count} {what}" for what, count in failed.most_common() if count)


def _remarks(report: CollapseReport, wanted: float | None) -> list[str]:
    remarks = []
    if report.interrupted:
        remarks.append("interrupted: the folios made so far are kept")
    if report.vanished:
        remarks.append("the target exited meanwhile")
    if report.out_of_memory:
        remarks.append(f"the collapse ended at the first failed charge: {report.out_of_memory}")
    if report.error is not None:
        remedy = f" ({report.error.help})" if report.error.help else ""
        remarks.append(f"the collapse ended early: {report.error.message}{remedy}")
    holes = sum(tally.failed_by_result[ScanResult.EXCEED_NONE_PTE] for tally in report.folios.values())
    if holes:
        remarks.append(f"{holes} runs have holes: --fill fills them")
    if report.plan.heat is not None and report.plan.heat.remark:
        remarks.append(report.plan.heat.remark)
    if price := report.split_price.remark(report.geometry):
        remarks.append(price)
    if report.remade.remark:
        remarks.append(report.remade.remark)
    remarks += _nothing_done(report)
    by_mover = report.plan.small and "move" in report.mechanisms.values()
    outside = report.after.out_of_reach_bytes(report.geometry)
    if reach := out_of_reach_remark(outside, report.geometry, recommend=not by_mover):
        remarks.append(reach)
    if wanted is not None and report.coverage < wanted:
        remarks.append(
            f"{percent(report.coverage)} {scope_name(report.plan)} is mapped as {size_and_more(report.plan)}:"
            f" less than the {percent(wanted)} that --min-coverage requires"
        )
    return remarks


def _nothing_done(report: CollapseReport) -> list[str]:
    """Return why nothing was done, if so: the work is finished, or reasons with their bytes."""
    plan = report.plan
    if plan.finished:
        return [f"nothing left to do: {format_size(plan.already_bytes)} already in folios of the requested sizes"]
    if not report.done_nothing:
        return []
    reasons = [f"{left.reason} ({format_size(left.resident)} resident)" for left in plan.left if left.resident]
    if not reasons:
        return ["nothing was done: no memory of this process could be collapsed"]
    return [f"nothing was done: {reasons[0]}", *(f"also: {reason}" for reason in reasons[1:MAX_REASONS])]
