"""``mthp trim TARGET``: give back pages of large folios that hold nothing but zeroes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

import click
from rich.console import Console

from mthp.cli.options import RATE, SHARE, json_option
from mthp.cli.render.output import console, note, print_json, progress_bar, say
from mthp.cli.render.tables import Table
from mthp.cli.several import Each, Failed, Total, do_each, print_each, summed, targets_argument
from mthp.cli.signals import exit_code, stopping_on_signals
from mthp.engine.trim import TrimOptions, TrimReport, trim_space
from mthp.metrics import out_of_reach_remark
from mthp.targets import Found, find_targets
from mthp.trimming import TrimBy
from mthp.units import format_size, percent


class TrimSum(Total):
    """The sums of several trims."""

    JSON: ClassVar = "zero_bytes trimmed given_back_bytes out_of_reach_bytes"

    zero_bytes = summed("plan.zero_bytes")
    trimmed = summed("trimmed")
    given_back_bytes = summed("given_back_bytes")
    out_of_reach_bytes = summed("plan.out_of_reach_bytes")

    @property
    def remark(self) -> str:
        """A sentence on the bytes out of reach; ``""`` if there are none."""
        # Targets are processes of this machine.
        plans = [report.plan for report in self.parts]
        return out_of_reach_remark(self.out_of_reach_bytes, plans[0].geometry) if plans else ""


@dataclass(frozen=True, slots=True)
class Trims:
    """The results of the trims of several targets.

    Attributes:
        targets: the report of each, or its error.
        total: their sums.
    """

    targets: tuple[TrimReport | Failed, ...]
    total: TrimSum


@click.command("trim")
@targets_argument
@click.option(
    "--zero",
    type=SHARE,
    default="50%",
    show_default=True,
    help="Trim folios with at least this share of pages that hold nothing but zeroes.",
)
@click.option(
    "--by",
    type=click.Choice(get_args(TrimBy)),
    help="cold: split the whole folio to base pages. split: only its empty parts. By default the better way here.",
)
@click.option("--rate", type=RATE, help="Bytes of folios split per second, such as 256M.")
@click.option("--dry-run", is_flag=True, help="Print the predicted result, and change nothing.")
@json_option
def command(
    targets: tuple[str, ...], zero: float, by: TrimBy | None, rate: int | None, dry_run: bool, as_json: bool
) -> int:
    """Give back memory of each TARGET that its large folios waste: pages that hold nothing but zeroes.

    A TARGET is a PID, the word self, or a name as `mthp --help` lists them. The kernel splits a folio and maps the
    shared zero page in place of each page of zeroes (Linux 6.12 and later). No code is injected, and nothing is
    stopped. The folios with the most zeroes come first. Ctrl-C ends it after the current folios.
    """
    options = TrimOptions(zero=zero, by=by, rate=rate)
    with stopping_on_signals() as stop:

        def work(found: Found) -> tuple[TrimReport, int]:
            with found.open() as space, progress_bar(f"trimming {found.label}", hidden=as_json) as progress:
                report = trim_space(space, options, dry_run=dry_run, progress=progress, stop=stop)
            # A signal after the last folio changed nothing.
            if report.interrupted and stop():
                return report, exit_code(stop.number)
            return report, 4 if report.vanished else 0 if report.complete else 1

        # Ancestors are not left out, because a trim stops nothing.
        each = do_each(find_targets(targets), work, stop=stop)
    total = TrimSum(each.done)
    if as_json:
        print_json("trim", each.done[0] if each.single else Trims(each.all, total))
    elif each.one:
        print_report(console(), each.done[0], options)
    else:
        print_each(each, targets_table(each, total), [total.remark])
    return each.code


def targets_table(each: Each[TrimReport], total: TrimSum) -> Table:
    """Return a table with a line for each target, and their sum."""
    columns = ["target", "in zeroes", "given back", "service", "reason"]
    rows = each.lines(
        lambda found, report: [
            report.plan.label,
            format_size(report.plan.zero_bytes),
            format_size(report.given_back_bytes),
            found.service,
            report.error or next(iter(report.reasons), "") or ("it exited" if report.vanished else ""),
        ],
        len(columns),
    )
    rows.append(["in all", format_size(total.zero_bytes), format_size(total.given_back_bytes), "", ""])
    return Table(each.counted, columns, rows, right={1, 2}, names={0, 3})


def print_report(out: Console, report: TrimReport, options: TrimOptions) -> None:
    """Print the result of a trim."""
    plan, geometry = report.plan, report.plan.geometry
    rows = [[geometry.label(order), str(count)] for order, count in plan.folios_by_order.items()]
    title = f"{plan.label}: of {plan.scanned_folios} large folios, those with {percent(options.zero)} of zeroes or more"
    out.print(Table(title, ["size", "folios"], rows, right={1}))
    how = f" (--by {plan.by})" if plan.by else ""
    say(out, f"{format_size(plan.zero_bytes)} in pages of nothing but zeroes can be given back{how}")
    remarks = [report.remade.remark, TrimSum([report]).remark]
    if report.dry_run:
        note(out, [*remarks, "dry run: nothing was changed"])
        return
    if report.left_by_order:
        left = [[geometry.label(order), str(count)] for order, count in sorted(report.left_by_order.items())]
        out.print(Table("Folios afterwards", ["size", "folios"], left, right={1}))
    if report.failed:
        failed = [[result.name, str(count), reason] for (result, reason), count in report.failed.most_common()]
        out.print(Table("Folios left as they are", ["result", "folios", "reason"], failed, right={1}))
    before, after = format_size(report.rss_before_bytes), format_size(report.rss_after_bytes)
    say(out, f"gave back {format_size(report.given_back_bytes)}: {before} of memory before, {after} now")
    if report.not_tried:
        remarks.append(f"{report.not_tried} folios were not tried: the trim ended early")
    if report.vanished:
        remarks.append("the target exited")
    if report.error:
        remarks.append(report.error)
    note(out, remarks)
