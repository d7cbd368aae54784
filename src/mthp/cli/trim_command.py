"""``mthp trim TARGET``: give back pages of large folios that hold nothing but zeroes."""

from __future__ import annotations

from typing import get_args

import click
from rich.console import Console

from mthp.cli.options import RATE, SHARE, json_option, target_argument
from mthp.cli.output import console, note, percent, print_json, progress_bar, say
from mthp.cli.render.tables import Table
from mthp.cli.signals import exit_code, stopping_on_signals
from mthp.engine.trim import TrimOptions, TrimReport, trim_space
from mthp.targets import open_target
from mthp.trimming import TrimBy
from mthp.units import format_size


@click.command("trim")
@target_argument
@click.option(
    "--zero",
    type=SHARE,
    default="50%",
    show_default=True,
    help="Trim folios of whose pages at least this share hold nothing but zeroes.",
)
@click.option(
    "--by",
    type=click.Choice(get_args(TrimBy)),
    help="cold: split the whole folio to base pages. split: only its empty parts. By default the better way here.",
)
@click.option("--rate", type=RATE, help="Bytes of folios split per second, such as 256M.")
@click.option("--dry-run", is_flag=True, help="Say what would be given back, and do nothing.")
@json_option
def command(target: str, zero: float, by: TrimBy | None, rate: int | None, dry_run: bool, as_json: bool) -> int:
    """Give back memory of TARGET that its large folios waste: pages that hold nothing but zeroes.

    TARGET is a PID, or the word self. The kernel splits a folio and maps the shared zero page in place of each page of
    zeroes (Linux 6.12 and later). No code is injected, and nothing is stopped. The folios with the most zeroes come
    first. Ctrl-C ends it after the folios at hand.
    """
    options = TrimOptions(zero=zero, by=by, rate=rate)
    with (
        open_target(target) as space,
        stopping_on_signals() as stop,
        progress_bar("trimming", hidden=as_json) as progress,
    ):
        report = trim_space(space, options, dry_run=dry_run, progress=progress, stop=stop)
    if as_json:
        print_json("trim", report)
    else:
        print_report(console(), report, options)
    if report.interrupted and stop():
        return exit_code(stop.number)
    return 4 if report.vanished else 0 if report.complete else 1


def print_report(out: Console, report: TrimReport, options: TrimOptions) -> None:
    """Print what a trim gave back."""
    plan, geometry = report.plan, report.plan.geometry
    rows = [[geometry.label(order), str(count)] for order, count in plan.folios_by_order.items()]
    title = f"{plan.label}: large folios with {percent(options.zero)} of zeroes, of {plan.looked_at} in all"
    out.print(Table(title, ["size", "folios"], rows, right={1}))
    how = f" (--by {plan.by})" if plan.by else ""
    say(out, f"{format_size(plan.zero_bytes)} in pages of nothing but zeroes can be given back{how}")
    if report.dry_run:
        note(out, [*filter(None, [report.remade.remark]), "dry run: nothing was changed"])
        return
    if report.left_by_order:
        left = [[geometry.label(order), str(count)] for order, count in sorted(report.left_by_order.items())]
        out.print(Table("What is left of them", ["size", "folios"], left, right={1}))
    if report.failed:
        failed = [[result.name, str(count), reason] for (result, reason), count in report.failed.most_common()]
        out.print(Table("Folios left as they are", ["result", "folios", "reason"], failed, right={1}))
    before, after = format_size(report.rss_before_bytes), format_size(report.rss_after_bytes)
    say(out, f"gave back {format_size(report.given_back_bytes)}: {before} of memory before, {after} now")
    remarks = [report.remade.remark] if report.remade.remark else []
    if report.not_tried:
        remarks.append(f"{report.not_tried} folios were not tried: it ended early")
    if report.vanished:
        remarks.append("the target exited")
    if report.error:
        remarks.append(report.error)
    note(out, remarks)
