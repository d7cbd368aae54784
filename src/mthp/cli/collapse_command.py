"""``mthp collapse TARGET``: carry out the plan, now, within a budget, and print the result."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, get_args

import click

from mthp import abilities
from mthp.addrspace import AddressSpace
from mthp.cli.options import (
    DURATION,
    RATE,
    SHARE,
    SHARE_OR_ZERO,
    bounds_options,
    json_option,
    made_of,
    plan_options,
    small_option,
)
from mthp.cli.render.outcomes import print_report, reason_of
from mthp.cli.render.output import console, milliseconds, print_json, progress_bar, say
from mthp.cli.render.tables import Table
from mthp.cli.several import Each, Failed, Total, common_share, do_each, print_each, summed, targets_argument
from mthp.cli.signals import Wish, exit_code, stopping_on_signals
from mthp.engine.collapse import collapse_space
from mthp.engine.report import CollapseReport
from mthp.engine.select import PlanOptions
from mthp.engine.space_plan import SpacePlan
from mthp.geometry import Geometry
from mthp.means import PAUSE_SHARE, Means, Mechanism, window_ns
from mthp.metrics import Coverage, out_of_reach_remark
from mthp.targets import Found, find_targets
from mthp.units import format_size, percent


@dataclass(frozen=True, slots=True)
class Wanted:
    """Requests for a collapse beside the plan.

    Attributes:
        move_refusals: reasons for which the mover would not begin; only of a dry run.
        min_coverage, min_coverage_reached: the requested coverage, and whether it is reached.
    """

    move_refusals: list[str]
    min_coverage: float | None
    min_coverage_reached: bool


@dataclass(frozen=True, slots=True)
class Collapsed:
    """The result of the collapse of one of several targets, and the requests for it."""

    JSON: ClassVar = "*report *wanted"

    report: CollapseReport
    wanted: Wanted

    @property
    def geometry(self) -> Geometry:
        """The machine's geometry."""
        return self.report.geometry


class CollapseSum(Total):
    """The sums of several collapses."""

    JSON: ClassVar = (
        "collapsed_bytes moved_bytes copied_bytes bloat_bytes=filled_bytes coverage_before coverage out_of_reach_bytes"
    )

    collapsed_bytes = summed("collapsed_bytes")
    moved_bytes = summed("moved_bytes")
    copied_bytes = summed("copied_bytes")
    filled_bytes = summed("filled_bytes")
    out_of_reach_bytes = summed("plan.out_of_reach_bytes")

    @property
    def coverage_before(self) -> float:
        """The share of all targets' memory in folios of the requested sizes, before."""
        return self._share([report.before for report in self.parts])

    @property
    def coverage(self) -> float:
        """The same share afterwards."""
        # After a dry run there is nothing to measure.
        return self._share([report.plan.after if report.dry_run else report.after for report in self.parts])

    def _share(self, parts: list[Coverage]) -> float:
        return common_share([report.plan for report in self.parts], parts)


@dataclass(frozen=True, slots=True)
class Collapses:
    """The results of the collapses of several targets.

    Attributes:
        targets: the report of each, or its error.
        total: their sums.
    """

    targets: tuple[Collapsed | Failed, ...]
    total: CollapseSum


@click.command("collapse")
@targets_argument
@plan_options
@small_option
@click.option(
    "--mechanism",
    type=click.Choice(get_args(Mechanism)),
    default="auto",
    show_default=True,
    help="madvise: MADV_COLLAPSE, for the PMD size. move: inject code that moves pages, for sizes below. madvise,move:"
    " each where it fits. khugepaged: drive the kernel's own. auto: the ones without injected code.",
)
@bounds_options
@click.option("--rate", type=RATE, help="Bytes collapsed per second at most, such as 500M.")
@click.option(
    "--min-coverage",
    type=SHARE_OR_ZERO,
    help="Exit with 1 if less than this share of the anonymous memory is mapped in folios of the requested sizes"
    " (--orders; the PMD size without) or larger ones afterwards.",
)
@click.option(
    "--max-pause",
    type=DURATION,
    default="1ms",
    show_default=True,
    help="The longest time for which TARGET may be stopped at once while pages are moved.",
)
@click.option(
    "--pause-share",
    type=SHARE,
    default=f"{PAUSE_SHARE:.0%}",
    show_default=True,
    help="The part of the time for which TARGET may then be stopped.",
)
@click.option(
    "--min-split-share",
    type=SHARE_OR_ZERO,
    default="0%",
    show_default=True,
    help="Leave PMD ranges alone if less than this share of their contents would lie in planned folios: a split copies"
    " all of a range.",
)
@click.option("--fill", is_flag=True, help="Fill holes by moving, too; MADV_COLLAPSE always does.")
@click.option("--verify", is_flag=True, help="Compare the bytes of every moved folio before and after.")
@click.option("--dry-run", is_flag=True, help="Print the predicted result, and change nothing.")
@json_option
def command(targets: tuple[str, ...], min_coverage: float | None, dry_run: bool, as_json: bool, **options: Any) -> int:
    """Collapse the memory of each TARGET, now, as `mthp plan` predicts with the same options.

    A TARGET is a PID, the word self, or a name as `mthp --help` lists them. The kernel's MADV_COLLAPSE makes folios of
    the PMD size. Smaller ones are made by splitting such a folio in place where debugfs is open (Linux 6.12), or by the
    kernel's khugepaged (Linux 7.2), else only by --mechanism move, which injects code into TARGET and repeatedly stops
    it for about a millisecond. The largest come first, and of each size the fullest; with --heat those that serve most
    accesses for each byte copied. Ctrl-C ends it after the current range or batch.

    With --mechanism khugepaged the kernel keeps its own order, works for all processes meanwhile, and knows only memory
    that was mapped or advised while a size was on.

    Holes are filled up to --max-bloat, pages are copied up to --max-copied, and the memory that --reserve names is left
    free below every limit of TARGET's cgroups and of the machine. The first failed charge to a cgroup ends it.
    """
    chosen, means = made_of(PlanOptions, options), made_of(Means, options)
    with stopping_on_signals() as stop:

        def work(found: Found) -> tuple[Collapsed, int]:
            made = _collapse_one(found, chosen, means, min_coverage, stop, dry_run=dry_run, hidden=as_json)
            return made, _code(made, stop)

        each = do_each(find_targets(targets), work, changes=True, stop=stop)
    total = CollapseSum([made.report for made in each.done])
    if as_json:
        print_json("collapse", each.done[0] if each.single else Collapses(each.all, total))
    elif each.one:
        print_report(console(), each.done[0].report, min_coverage, each.done[0].wanted.move_refusals)
    else:
        # All targets are processes of this machine.
        recommend = dry_run or not (chosen.small and "move" in means.mechanism)
        reach = [
            out_of_reach_remark(total.out_of_reach_bytes, made.geometry, recommend=recommend) for made in each.done[:1]
        ]
        print_each(each, targets_table(each, total), reach)
    return each.code


def _code(made: Collapsed, stop: Wish) -> int:
    # A signal after the last block changed nothing.
    if made.report.interrupted and stop():
        return exit_code(stop.number)
    return 4 if made.report.vanished else 0 if made.report.complete and made.wanted.min_coverage_reached else 1


def _collapse_one(
    found: Found,
    chosen: PlanOptions,
    means: Means,
    min_coverage: float | None,
    stop: Wish,
    *,
    dry_run: bool,
    hidden: bool,
) -> Collapsed:
    with found.open() as space:
        with progress_bar(f"collapsing {found.label}", hidden=hidden) as progress:
            report = collapse_space(
                space,
                chosen,
                means,
                dry_run=dry_run,
                progress=progress,
                stop=stop,
                before_move=partial(_announce, space, means),
            )
        # A collapse reports the refusals of the blocks that it tried.
        refusals = abilities.move_refusals(space, means) if dry_run and report.folios else []
    covered = min_coverage is None or _coverage(report) >= min_coverage
    return Collapsed(report, Wanted(refusals, min_coverage, covered))


def targets_table(each: Each[Collapsed], total: CollapseSum) -> Table:
    """Return a table with a line for each target, and their sum."""
    columns = ["target", "collapsed", "copied", "bloat", "before", "after", "service", "reason"]
    rows = each.lines(
        lambda found, made: [
            made.report.plan.label,
            *_cells(CollapseSum([made.report])),
            found.service,
            reason_of(made.report),
        ],
        len(columns),
    )
    rows.append(["in all", *_cells(total), "", ""])
    title = f"{each.counted}; before and after are shares of anonymous memory"
    return Table(title, columns, rows, right={1, 2, 3, 4, 5}, names={0, 6})


def _cells(total: CollapseSum) -> list[str]:
    sizes = [total.collapsed_bytes + total.moved_bytes, total.copied_bytes, total.filled_bytes]
    return [*map(format_size, sizes), percent(total.coverage_before), percent(total.coverage)]


def _announce(space: AddressSpace, means: Means, plan: SpacePlan, mechanism: Mechanism) -> None:
    """Warn on standard error, before it begins, of the effects of moving pages on a process that is not ours."""
    # A label begins with the PID.
    if space.label.split()[0] == str(os.getpid()):
        return
    if mechanism == "khugepaged":
        click.echo(
            "driving the kernel's khugepaged: the planned sizes are on for the whole system while it works, and it may"
            " collapse memory of other processes too. All switches are put back at the end, also if mthp is"
            " killed",
            err=True,
        )
        return
    out = console(stderr=True)
    threads = abilities.threads(space)
    stopped = "its thread is" if threads == 1 else f"all of its {threads} threads are"
    pause = milliseconds(window_ns(threads, means.max_pause_ns) / 1e9)
    for line in (
        f"moving pages of {plan.label} into folios below {plan.geometry.label(plan.geometry.pmd_order)}: {stopped}"
        f" stopped repeatedly. The aim is {pause} at a time and {percent(means.pause_share)} of the time; the result"
        " shows the pauses. One thread runs a small piece of injected code, which moves pages away (UFFDIO_MOVE) and"
        " copies them back;",
        "meanwhile the switch of one folio size (hugepages-<size>kB/enabled) is `always` for the whole system. It is"
        " put back at the end, also if mthp is killed",
    ):
        say(out, line)


def _coverage(report: CollapseReport) -> float:
    return report.plan.coverage_after if report.dry_run else report.coverage
