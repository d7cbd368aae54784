"""How commands print: one JSON object, or tables and progress on a terminal, or plain text when piped."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Protocol

import click
from rich import box
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mthp.text import clean


class ProgressBar(Protocol):
    """Shows how far something has come."""

    def __call__(self, done: int, total: int, what: str = "") -> None:
        """Show that `done` of `total` are done, and what is being worked on."""


PLAIN_WIDTH = 1 << 16
"""Width of plain text, in columns: wide enough that nothing is cut or wrapped, the longest path included."""


def console() -> Console:
    """A console for standard output: coloured on a terminal, plain and unwrapped when piped."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(width=PLAIN_WIDTH, highlight=False, color_system=None)


def print_json(command: str, data: dict[str, Any], **rows: Iterable[dict[str, Any]]) -> None:
    """Print the one JSON object of `command`; its schema comes first.

    Args:
        rows: further keys whose values are lists, written item by item as they are made, however many there are.
    """
    text = json.dumps({"schema": f"mthp.{command}/1"} | data, indent=2)
    click.echo(text.removesuffix("\n}"), nl=False)
    for key, items in rows.items():
        click.echo(f",\n  {json.dumps(key)}: [", nl=False)
        for number, item in enumerate(items):
            click.echo(f"{',' if number else ''}\n    {json.dumps(item)}", nl=False)
        click.echo("\n  ]", nl=False)
    click.echo("\n}")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> Group:
    """A titled table.

    Args:
        right: numbers of the columns that hold figures, and are aligned to the right.
    """
    on_terminal = sys.stdout.isatty()
    made = Table(box=box.SIMPLE_HEAD if on_terminal else None, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        cut = on_terminal and index == len(columns) - 1
        made.add_column(name, justify="right" if index in right else "left", no_wrap=not cut, overflow="fold")
    for row in rows:
        made.add_row(*(Text(clean(cell)) for cell in row))
    return Group("", Text(clean(title), style="bold"), made)


@contextlib.contextmanager
def progress_bar(text: str, *, hidden: bool = False) -> Iterator[ProgressBar]:
    """A progress bar on standard error, where that is a terminal. Gives a function that takes (done, in all, what)."""
    if hidden or not sys.stderr.isatty():
        yield lambda done, total, what="": None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(clean(text), total=None)

        def show(done: int, total: int, what: str = "") -> None:
            bar.update(task, completed=done, total=max(total, 1), description=clean(f"{text} {what}".rstrip()))

        yield show


def percent(share: float) -> str:
    """A share of 1 as a percentage with one decimal."""
    return f"{100 * share:.1f}%"


def milliseconds(seconds: float) -> str:
    """A duration in milliseconds."""
    return f"{1000 * seconds:.2f} ms"


def note(out: Console, lines: Sequence[str]) -> None:
    """Print remarks below a result, each on its own line."""
    for line in lines:
        out.print(Text(clean(f"note: {line}"), style="yellow"), soft_wrap=True)


def say(out: Console, line: str) -> None:
    """Print one line of text, which may hold names that a process or a foreign file chose."""
    out.print(Text(clean(line)), soft_wrap=True)
