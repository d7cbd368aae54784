"""``mthp demo``: the main job, end to end, on a process that it starts itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from mthp.cli.options import SECONDS, SIZE, json_option
from mthp.cli.output import console, milliseconds, note, print_json, say
from mthp.cli.render.tables import Table
from mthp.demo.story import DEFAULT_SIZE, Moment, Progress, Story, tell
from mthp.engine.space_plan import SpacePlan
from mthp.errors import UsageError
from mthp.units import format_size, percent


@click.command("demo")
@click.option("--size", type=SIZE, help="Memory of the workload; 1G by default, or what memory allows.")
@click.option(
    "--seconds",
    type=SECONDS,
    default="1s",
    show_default=True,
    help="How long each of 10 measurements takes.",
)
@json_option
def command(size: int | None, seconds: float, as_json: bool) -> int:
    """Show the whole story on a process of its own: inspect, plan, collapse, and how much faster it got.

    The workload is an in-memory SQLite database, grown, changed and with holes, in a process of its own. It is given
    4 KiB pages, inspected, planned under five policies, collapsed, inspected again, and measured before and after.
    Nothing else on the machine is touched.
    """
    if not 0 < seconds <= 600:
        raise UsageError(f"--seconds {seconds:g} is not above 0 and up to 600")
    with _progress(hidden=as_json) as progress:
        story = tell(DEFAULT_SIZE if size is None else size, seconds, progress)
    if as_json:
        print_json("demo", story)
    else:
        print_story(console(), story)
    return 0 if story.intact else 1


@contextmanager
def _progress(*, hidden: bool) -> Iterator[Progress]:
    """Progress of several steps: a bar for each on a terminal, else a line for each as it begins."""
    if hidden:
        yield lambda what, done, total: None
    elif sys.stderr.isatty():
        columns = (TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn())
        with Bars(*columns, console=Console(stderr=True)) as bars:
            tasks: dict[str, TaskID] = {}

            def advance(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(what)
                bars.update(tasks[what], completed=done, total=max(total, 1))

            yield advance
    else:
        begun: set[str] = set()

        def tell_once(what: str, done: int, total: int) -> None:
            if what not in begun:
                begun.add(what)
                click.echo(f"{what} ...", err=True)

        yield tell_once


def print_story(out: Console, story: Story) -> None:
    """Print the story: the plans side by side, then before and after."""
    geometry = story.census.geometry
    say(out, f"{story.target}, Linux {story.census.kernel}, {geometry.name}")
    pmd = geometry.label(geometry.pmd_order)
    columns = ["policy", "max_ptes_none", "bytes by folio size", "copied", "bloat", f"{pmd} mapped"]
    rows = [_plan_row(plan) for plan in story.plans]
    out.print(Table("What each policy would do", columns, rows, right={1, 3, 4}))
    if story.before is not None and story.after is not None and story.deed is not None:
        _print_before_and_after(out, story, story.before, story.after)
    note(out, story.notes)


def _plan_row(plan: SpacePlan) -> list[str]:
    geometry = plan.geometry
    sizes = (
        f"{geometry.label(order)}:{format_size(count * geometry.size_of(order))}"
        for order, count in plan.folios_by_order.items()
    )
    return [
        plan.policy,
        str(plan.tunables.max_ptes_none),
        " ".join(sizes) or "none",
        format_size(plan.copied_bytes),
        format_size(plan.filled_bytes),
        f"{percent(plan.coverage)} -> {percent(plan.coverage_after)}",
    ]


def _print_before_and_after(out: Console, story: Story, before: Moment, after: Moment) -> None:
    geometry, deed = story.census.geometry, story.deed
    assert deed is not None
    pmd = geometry.label(geometry.pmd_order)
    pages = [moment.census.anonymous for moment in (before, after)]
    shares = [percent(count.coverage.share(geometry.pmd_order)) for count in pages]
    rows = [
        ["random lookups a second", f"{before.speed.median:,.0f}", f"{after.speed.median:,.0f}", _times(story)],
        ["  lower to upper quartile", _quartiles(before), _quartiles(after), ""],
        [f"anonymous memory mapped as {pmd}", *shares, ""],
        ["AnonHugePages", format_size(before.stats.anon_huge_bytes), format_size(after.stats.anon_huge_bytes), ""],
        ["resident", format_size(before.stats.rss_bytes), format_size(after.stats.rss_bytes), ""],
        ["holes in the heap", format_size(before.stats.hole_bytes), format_size(after.stats.hole_bytes), ""],
        ["data, every byte read", "intact", "the same" if story.intact else "CHANGED", ""],
    ]
    out.print(Table("Before and after the collapse", ["", "before", "after", "ratio"], rows, right={1, 2}))
    failed = "".join(f", {count} {name}" for name, count in deed.failed_ranges.items())
    out.print()
    say(
        out,
        f"collapsed by {deed.by}: {deed.collapsed_ranges} ranges of {pmd} in {deed.elapsed_seconds:.2f} s{failed};"
        f" copied {format_size(deed.copied_bytes)}, added {format_size(deed.bloat_bytes)};"
        f" calls p50 {milliseconds(deed.p50_seconds)}, p99 {milliseconds(deed.p99_seconds)},"
        f" max {milliseconds(deed.max_seconds)}",
    )


def _times(story: Story) -> str:
    return f"{story.speedup:.2f} times"


def _quartiles(moment: Moment) -> str:
    return f"{moment.speed.low:,.0f} to {moment.speed.high:,.0f}"
