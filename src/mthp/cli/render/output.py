"""Output of commands: one JSON object, or tables and progress on a terminal, or plain text when piped."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from mthp.cli.render.tables import MIN_WIDTH, wrapped
from mthp.objects import items, to_json
from mthp.text import clean


class ProgressBar(Protocol):
    """Shows the progress of some work."""

    def __call__(self, done: int, total: int, what: str = "") -> None:
        """Show that `done` of `total` are done, and the current step."""


PLAIN_WIDTH = 1 << 16
"""Width of plain text, in columns: wide enough that nothing is cut or wrapped, the longest path included."""


def console(*, stderr: bool = False) -> Console:
    """Return a console for standard output, or for standard error.

    On a terminal it is coloured and as wide as the terminal. Elsewhere it is plain and :data:`PLAIN_WIDTH` columns
    wide: every row of a table is one line, which scripts can read. COLUMNS in the environment sets the width of both.
    """
    on_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = _columns() or (None if on_terminal else PLAIN_WIDTH)
    # Without highlighting, which colours every number.
    made = Console(stderr=stderr, width=width, highlight=False, color_system="auto" if on_terminal else None)
    # No layout is narrower: the terminal breaks longer lines itself.
    made.width = max(made.width, MIN_WIDTH)
    return made


def _columns() -> int | None:
    """Return the width in the environment; None if it is not set to a number."""
    text = os.environ.get("COLUMNS", "")
    if not re.fullmatch("[0-9]{1,5}", text) or not int(text):
        return None
    return min(int(text), PLAIN_WIDTH)


def print_json(command: str, *objects: object) -> None:
    """Print the one JSON object of `command`, which has the keys of all `objects`; its schema comes first.

    A list is written item by item while it is made, so it may be of any length.
    """
    click.echo(f'{{\n  "schema": "mthp.{command}/1"', nl=False)
    for each in objects:
        # Some figures, such as those of Coverage, are computed from pages with it.
        geometry = getattr(each, "geometry", None)
        for key, value in items(each):
            click.echo(f",\n  {json.dumps(key)}: ", nl=False)
            if isinstance(value, Iterable) and not isinstance(value, str | Mapping):
                _print_list(value, geometry)
            else:
                # Newlines within texts are escaped, so these are all between values.
                click.echo(json.dumps(to_json(value, geometry), indent=2).replace("\n", "\n  "), nl=False)
    click.echo("\n}")


def _print_list(values: Iterable[object], geometry: object) -> None:
    click.echo("[", nl=False)
    number = 0
    for number, value in enumerate(values, 1):
        click.echo(f"{',' if number > 1 else ''}\n    {json.dumps(to_json(value, geometry))}", nl=False)
    click.echo("\n  ]" if number else "]", nl=False)


@contextlib.contextmanager
def progress_bar(text: str, *, hidden: bool = False) -> Iterator[ProgressBar]:
    """Yield a function of (done, in all, step) that draws a bar on standard error, if that is a terminal."""
    if hidden or not sys.stderr.isatty():
        yield lambda done, total, what="": None
        return
    columns = (
        # Names may have brackets, which are markup to rich.
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


def milliseconds(seconds: float) -> str:
    """Return a duration in milliseconds."""
    return f"{1000 * seconds:.2f} ms"


def note(out: Console, lines: Sequence[str]) -> None:
    """Print remarks below a result, each on a line of its own; empty ones are left out."""
    for line in filter(None, lines):
        _print_wrapped(out, f"note: {line}", "yellow")


def say(out: Console, line: str) -> None:
    """Print one line of text, which may hold names that a process or a foreign file chose."""
    _print_wrapped(out, line)


def _print_wrapped(out: Console, text: str, style: str = "") -> None:
    for line in wrapped(clean(text), out.width):
        # Wrapped already. As Text, because rich reads markup in a str.
        out.print(Text(line, style=style), soft_wrap=True)
