"""``mthp collapse TARGET``: carry out the plan, now, within a budget; say what came of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import click

from mthp import abilities
from mthp.addrspace import AddressSpace
from mthp.budget import Amount
from mthp.cli.collapse_output import print_report
from mthp.cli.options import (
    DURATION,
    RATE,
    SHARE,
    SHARE_OR_ZERO,
    bounds_options,
    json_option,
    plan_options,
    planned,
    target_argument,
)
from mthp.cli.output import console, milliseconds, percent, print_json, progress_bar, say
from mthp.cli.signals import exit_code, stopping_on_signals
from mthp.engine.collapse import collapse_space
from mthp.engine.report import CollapseReport
from mthp.engine.space_plan import SpacePlan
from mthp.means import PAUSE_SHARE, Means, Mechanism
from mthp.price import window_ns
from mthp.targets import open_target, refuse_ancestor


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was wanted of a collapse beside the plan.

    Attributes:
        move_hindrances: why the mover would not begin; only of a dry run.
        min_coverage, min_coverage_reached: the coverage that was wanted, and whether it is reached.
    """

    move_hindrances: list[str]
    min_coverage: float | None
    min_coverage_reached: bool


@click.command("collapse")
@target_argument
@plan_options
@click.option(
    "--mechanism",
    type=click.Choice(get_args(Mechanism)),
    default="auto",
    show_default=True,
    help="madvise: MADV_COLLAPSE, for the PMD size. move: inject code that moves pages, for sizes below. madvise,move:"
    " each where it fits. khugepaged: drive the kernel's own. auto: what needs no injected code.",
)
@bounds_options
@click.option("--rate", type=RATE, help="Bytes collapsed per second at most, such as 500M.")
@click.option(
    "--min-coverage",
    type=SHARE_OR_ZERO,
    help="Exit with 1 if less than this share of the anonymous memory is mapped in folios of the sizes asked for"
    " (--orders; the PMD size without) or larger ones afterwards.",
)
@click.option(
    "--max-pause",
    type=DURATION,
    default="1ms",
    show_default=True,
    help="How long TARGET may stand still at a time while pages are moved.",
)
@click.option(
    "--pause-share",
    type=SHARE,
    default=f"{PAUSE_SHARE:.0%}",
    show_default=True,
    help="The part of the time that it may stand still then.",
)
@click.option("--fill", is_flag=True, help="Fill holes by moving, too; MADV_COLLAPSE always does.")
@click.option("--verify", is_flag=True, help="Compare the bytes of every moved folio before and after.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@json_option
def command(
    target: str,
    mechanism: Any,
    max_bloat: Amount | None,
    reserve: Amount | None,
    max_threads: int | None,
    rate: int | None,
    min_coverage: float | None,
    max_pause: float,
    pause_share: float,
    fill: bool,
    verify: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Collapse the memory of TARGET, now, as `mthp plan` says with the same options.

    TARGET is a PID, or the word self. The kernel's MADV_COLLAPSE makes folios of the PMD size. Smaller ones are made by
    splitting such a folio in place where debugfs is open (Linux 6.12), or by the kernel's khugepaged (Linux 7.2), else
    only by --mechanism move, which injects code into TARGET and stops it again and again for about a millisecond. The
    largest come first, and of each size the fullest. Ctrl-C ends it after the range or the batch at hand.

    khugepaged goes by its own order, works for all processes while it is driven, and knows only memory that was mapped
    or advised while a size was on.

    Holes are filled up to --max-bloat, and memory is left free below every limit of TARGET's cgroups and of the
    machine, as --reserve says. The first failed charge ends the run.
    """
    refuse_ancestor(target)
    with open_target(target) as space, stopping_on_signals() as stop:
        means = Means(
            mechanism=mechanism,
            max_bloat=max_bloat,
            reserve=reserve,
            max_threads=max_threads,
            rate=rate,
            max_pause=max_pause,
            pause_share=pause_share,
            fill=fill,
            verify=verify,
        )
        with progress_bar("collapsing", hidden=as_json) as progress:
            report = collapse_space(
                space,
                planned(options),
                means,
                dry_run=dry_run,
                progress=progress,
                stop=stop,
                before_move=partial(_announce, space, means),
            )
        hindrances = abilities.move_refusals(space, means) if dry_run and report.folios else []
    covered = min_coverage is None or _coverage(report) >= min_coverage
    if as_json:
        print_json("collapse", report, Wanted(hindrances, min_coverage, covered))
    else:
        print_report(console(), report, min_coverage, hindrances)
    if report.interrupted and stop():
        return exit_code(stop.number)
    return 4 if report.vanished else 0 if report.complete and covered else 1


def _announce(space: AddressSpace, means: Means, plan: SpacePlan, mechanism: Mechanism) -> None:
    """Say on standard error, before it begins, what moving pages means for a process that is not ours."""
    if space.label.split()[0] == str(os.getpid()):
        return
    if mechanism == "khugepaged":
        click.echo(
            "driving the kernel's khugepaged: the planned sizes are on for the whole system while it works, and it may"
            " collapse memory of other processes too. All switches are put back at the end, and if mthp is"
            " killed",
            err=True,
        )
        return
    out = console(stderr=True)
    threads = abilities.threads(space)
    pause = milliseconds(window_ns(threads, means.max_pause_ns) / 1e9)
    for line in (
        f"moving pages of {plan.label} into folios below {plan.geometry.label(plan.geometry.pmd_order)}: all of its"
        f" {threads} threads are stopped again and again. The aim is {pause} at a time and"
        f" {percent(means.pause_share)} of the time; the result says how long the pauses were. One thread runs a"
        " small piece of code that is injected,"
        " which moves pages away (UFFDIO_MOVE) and copies them back;",
        "meanwhile the switch of one folio size (hugepages-<size>kB/enabled) is `always` for the whole system. It is"
        " put back at the end, and if mthp is killed",
    ):
        say(out, line)


def _coverage(report: CollapseReport) -> float:
    return report.plan.coverage_after if report.dry_run else report.coverage
