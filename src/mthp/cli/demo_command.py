"""``mthp demo``: mTHPs beside huge pages, on processes that it starts itself."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from mthp.cli.options import SECONDS, SIZE, json_option
from mthp.cli.render.output import console, note, print_json, say
from mthp.cli.render.tables import Table
from mthp.demo.story import DEFAULT_SIZE, Chapter, Story, tell
from mthp.errors import UsageError
from mthp.progress import StepProgress
from mthp.units import format_size, percent


@click.command("demo")
@click.option("--size", type=SIZE, help="Memory of each workload; 256M by default, or less if memory is short.")
@click.option(
    "--seconds",
    type=SECONDS,
    default="500ms",
    show_default=True,
    help="Duration of each of 25 measurements.",
)
@json_option
def command(size: int | None, seconds: float, as_json: bool) -> int:
    """Show mTHPs beside huge pages on processes of its own: memory, time, pauses, speed; and give memory back.

    Two workloads have the same data: in-memory SQLite databases with holes in their heaps, on base pages at first. One
    is collapsed to folios of 64K and more, the other to huge pages, and these are trimmed. Both are measured before and
    after. Nothing else on the machine is touched.
    """
    if not 0 < seconds <= 600:
        raise UsageError(f"--seconds {seconds:g} is not above 0 and up to 600")
    with _progress(hidden=as_json) as progress:
        story = tell(DEFAULT_SIZE if size is None else size, seconds, progress)
    if as_json:
        print_json("demo", story)
    else:
        print_story(console(), story)
    return 0 if story.complete else 1


@contextmanager
def _progress(*, hidden: bool) -> Iterator[StepProgress]:
    """Show the progress of several steps: a bar for each on a terminal, else a line for each as it begins."""
    if hidden:
        yield lambda done, total, what: None
    elif sys.stderr.isatty():
        columns = (TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn())
        with Bars(*columns, console=Console(stderr=True)) as bars:
            tasks: dict[str, TaskID] = {}

            def advance(done: int, total: int, what: str) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(what)
                bars.update(tasks[what], completed=done, total=max(total, 1))

            yield advance
    else:
        # A log has a line for each step, and no line that is drawn again.
        begun: set[str] = set()

        def tell_once(done: int, total: int, what: str) -> None:
            if what not in begun:
                begun.add(what)
                click.echo(f"{what} ...", err=True)

        yield tell_once


def print_story(out: Console, story: Story) -> None:
    """Print the story: each state beside the one before, the mechanisms, and the next commands to type."""
    geometry = story.geometry
    size = geometry.label(story.order)
    say(out, f"{story.target}, Linux {story.kernel}, {geometry.name}")
    chapters = story.chapters
    heads = ["", *(chapter.name for chapter in chapters)]
    rows = [
        [f"in folios of {size} and more", *(percent(one.coverage) for one in chapters)],
        ["anonymous memory", *(format_size(one.resident_bytes) for one in chapters)],
        # The first chapter is the state before, without an operation.
        ["  more than before", "", *(_signed(one.added_bytes) for one in chapters[1:])],
        ["it took", "", *(f"{one.elapsed:.2f} s" for one in chapters[1:])],
        ["lookup meanwhile: p50", *(_waited(one, "p50") for one in chapters)],
        ["                  p99", *(_waited(one, "p99") for one in chapters)],
        ["                  max", *(_waited(one, "max") for one in chapters)],
        ["lookups a second after", *(f"{one.speed.median:,.0f}" if one.speed else "" for one in chapters)],
        ["  times before", *(f"{one.speedup:.2f}" if one.speedup else "" for one in chapters)],
    ]
    out.print(Table("The same data, by mTHPs and by huge pages", heads, rows, right=set(range(1, len(heads)))))
    out.print()
    say(out, "every byte of the data reads as before" if story.intact else "THE DATA CHANGED")
    made: dict[str, list[str]] = {}
    for order, mechanism in story.mechanisms.items():
        made.setdefault(mechanism or "nothing", []).append(geometry.label(order))
    if made:
        by = "; ".join(f"{', '.join(sizes)} by {mechanism}" for mechanism, sizes in made.items())
        say(out, f"mTHPs were made so: {by}" + (f" ({story.why})" if story.why else ""))
    if "move" in made:
        say(out, "move injects code: on processes of yours mthp does it only with --mechanism madvise,move")
    note(out, [*story.undone, *story.notes])
    for line in NEXT.splitlines():
        say(out, line)
    # As after `make demo`, which installs mthp in .venv.
    if shutil.which("mthp") is None and Path(sys.argv[0]).name == "mthp":
        say(out, f"mthp is not on the PATH: it is {sys.argv[0]}")


def _signed(size: int) -> str:
    return f"{'-' if size < 0 else '+'}{format_size(abs(size))}"


def _waited(chapter: Chapter, which: str) -> str:
    return "" if chapter.waits is None else f"{getattr(chapter.waits, which) * 1e6:,.0f} us"


NEXT = """
Next, with the PID of a process of yours:
  mthp doctor                   which abilities this machine has, and how to get the rest
  mthp plan PID                 predict a collapse
  mthp collapse PID --dry-run   the same; without --dry-run, carry it out
  mthp trim PID --dry-run       find the memory that its large folios waste"""
