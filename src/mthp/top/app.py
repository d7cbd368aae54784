"""The screen of `mthp top`: a table that keeps itself up to date, bars, and keys.

The screen draws the source's latest values and never waits for it. Slow work is in threads: the looks
(:mod:`~mthp.top.survey`, :mod:`~mthp.top.mapped`), the request to the daemon, a collapse (:mod:`~mthp.top.carrying`).
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.coordinate import Coordinate
from textual.css.query import NoMatches
from textual.widgets import DataTable, Footer, Input, Static

from mthp.text import clean
from mthp.top.carrying import Carrying
from mthp.top.columns import COLUMNS, PADDING, column_heads, column_widths, row_cells
from mthp.top.mapped import Mapped
from mthp.top.model import SORTS, Row, arranged, totals
from mthp.top.screens import Notice, Question, Running, daemon_line, keys_text, plan_text, question_text
from mthp.top.survey import View
from mthp.units import format_size

MAX_ROWS = 1000
"""Most rows in the table: more cannot be scrolled through usefully, and a filter finds the others."""

INTERVAL = 0.5
"""Seconds between two drawings."""


class TopApp(App[int]):
    """The application of `mthp top`."""

    TITLE = "mthp top"
    CSS_PATH = "app.tcss"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("p", "plan", "plan"),
        Binding("c", "collapse", "collapse"),
        Binding("s", "sort", "sort"),
        Binding("r", "reverse", "reverse"),
        Binding("slash", "filter", "filter", key_display="/"),
        # With priority over the table, which has its own actions for these keys.
        Binding("left", "step(-1)", "step back", show=False, priority=True),
        Binding("right", "step(1)", "step on", show=False, priority=True),
        Binding("home", "first", "first step", show=False, priority=True),
        Binding("end", "last", "last step", show=False, priority=True),
        Binding("t", "theme", "light/dark"),
        Binding("question_mark", "keys", "keys", key_display="?"),
        Binding("escape", "show_all", "show all", show=False),
        Binding("q", "leave", "quit"),
    ]

    def __init__(self, view: View) -> None:
        super().__init__()
        self.view = view
        self.sort = "gain"
        self.reversed = False
        self.wanted = ""
        self._drawn: list[int] = []
        self._widths: list[int] = []
        self._cells: dict[tuple[int, int], Text] = {}
        self._rows: dict[int, Row] = {}
        self._daemon: Mapping[str, Any] | None = None
        self._carrying: Carrying | None = None

    def compose(self) -> ComposeResult:
        yield Static(id="head")
        yield Input(placeholder="part of a name or number; enter keeps it, escape shows all", id="filter")
        yield DataTable(id="table", cursor_type="row", zebra_stripes=True)
        yield Static(id="steps")
        yield Static(id="detail")
        yield Static(id="daemon")
        yield Footer()

    def on_mount(self) -> None:
        self.query_one("#filter").display = False
        self.query_one("#steps").display = bool(self._mapped and self._mapped.steps)
        self.table.focus()
        self._end_on_signals()
        self.draw()
        self.set_interval(INTERVAL, self._draw_again)
        self.ask_daemon()
        self.set_interval(2.0, self.ask_daemon)

    @property
    def table(self) -> DataTable[Text]:
        """The table."""
        table: DataTable[Text] = self.query_one("#table", DataTable)
        return table

    @property
    def chosen(self) -> Row | None:
        """The row under the cursor."""
        at = self.table.cursor_row
        return self._rows.get(self._drawn[at]) if 0 <= at < len(self._drawn) else None

    @property
    def _mapped(self) -> Mapped | None:
        return self.view.source if isinstance(self.view.source, Mapped) else None

    def _draw_again(self) -> None:
        # Textual removes widgets one by one at the end, so the table may be gone already.
        with contextlib.suppress(NoMatches):
            self.draw()

    def draw(self) -> None:
        """Redraw the screen from the source's rows."""
        # Another screen covers it.
        if len(self.screen_stack) > 1:
            return
        # Read first, because emptying the table moves the cursor and scrolls to the top.
        cursor = self.table.cursor_row
        self._lay_out()
        rows = self.view.source.rows()
        shown = arranged(rows, self.sort, reverse=self.reversed, wanted=self.wanted)[:MAX_ROWS]
        self._rows = {row.key: row for row in shown}
        self._fill([row.key for row in shown], cursor)
        # After the rows have changed, so that the next looks go to those that are visible now.
        self.view.source.show(self._visible())
        self._draw_head(len(rows), totals(rows))
        self._draw_steps()
        self._draw_detail()

    def on_resize(self) -> None:
        self._draw_again()

    def _lay_out(self) -> None:
        """Choose columns that fit the terminal, and empty the table if they changed."""
        widths = column_widths(self.size.width, mapped=self._mapped is not None)
        if widths == self._widths:
            return
        table = self.table
        table.clear(columns=True)
        for head, width in zip(column_heads(widths, mapped=self._mapped is not None), widths, strict=True):
            table.add_column(head, width=width)
        # Cells have the widths of their columns, so none can stay.
        self._widths = widths
        self._cells.clear()
        self._drawn = []

    def _fill(self, keys: list[int], cursor: int) -> None:
        """Put the rows `keys` into the table, the cursor in row `cursor`. Leave unchanged cells alone."""
        table = self.table
        # Only then is the table filled again; else it keeps its place, and unchanged cells are not drawn.
        if len(keys) != len(self._drawn):
            scroll = table.scroll_offset
            table.clear()
            self._cells.clear()
            for key in keys:
                table.add_row(*self._cells_of(self._rows[key]))
            table.move_cursor(row=min(cursor, max(0, len(keys) - 1)), animate=False)
            table.scroll_to(y=scroll.y, animate=False)
            self._drawn = keys
            return
        for at, key in enumerate(keys):
            for column, cell in enumerate(self._cells_of(self._rows[key])):
                if self._cells.get((at, column)) != cell:
                    self._cells[at, column] = cell
                    table.update_cell_at(Coordinate(at, column), cell)
        self._drawn = keys

    def _visible(self) -> list[int]:
        table = self.table
        first = max(0, int(table.scroll_offset.y))
        return self._drawn[first : first + max(1, table.size.height)]

    def _cells_of(self, row: Row) -> list[Text]:
        mapped = self._mapped is not None
        return row_cells(row, self._widths, self.view.geometry, dark=self.current_theme.dark, mapped=mapped)

    def _draw_head(self, count: int, sums: tuple[int, int]) -> None:
        view = self.view
        mapped = self._mapped
        title = clean(mapped.label or view.title) if mapped else view.title
        what = ("mapping" if mapped else "process", "mappings" if mapped else "processes")[count != 1]
        order = f"by {self.sort}{', reversed' if self.reversed else ''}"
        text = Text()
        text.append(title, style="bold")
        text.append(f"   {count:,} {what}, {format_size(sums[0])} resident, {format_size(sums[1])} to gain   {order}")
        if self.wanted:
            text.append(f"   only {clean(self.wanted)!r} ({len(self._drawn):,})", style="bold")
        if mapped and mapped.trouble:
            text.append(f"   {clean(mapped.trouble)}", style="bold red")
        if view.switches:
            text.append(f"\n{view.switches}", style="dim")
        self.query_one("#head", Static).update(text)

    def _draw_steps(self) -> None:
        mapped = self._mapped
        if mapped is None or not mapped.steps:
            return
        where = f" ▶  step {mapped.step + 1} of {len(mapped.steps)}, {mapped.steps[mapped.step]:g} s"
        reading = "" if mapped.arrived else "  reading ..."
        # With room for the last text also when it is absent, so that the bar keeps its length.
        width = max(10, self.size.width - len(f"◀ {where}  reading ...") - PADDING)
        last = max(1, len(mapped.steps) - 1)
        at = round(mapped.step / last * (width - 1))
        text = Text("◀ ")
        text.append("━" * at, style="bold")
        text.append("●", style="bold")
        text.append("─" * (width - 1 - at), style="dim")
        text.append(where)
        text.append(reading, style="dim")
        self.query_one("#steps", Static).update(text)

    def _draw_detail(self) -> None:
        row = self.chosen
        if row is None:
            why = "nothing matches" if self.wanted else "nothing is resident"
            self.query_one("#detail", Static).update(Text(why, style="dim"))
            return
        self.query_one("#detail", Static).update(plan_text(row, self.view.geometry, self._policy))

    @property
    def _policy(self) -> str:
        policy = self.view.options.policy
        return policy if isinstance(policy, str) else policy.name

    @work(thread=True, exclusive=True, group="daemon")
    def ask_daemon(self) -> None:
        """Request the daemon's status and show it."""
        status = self.view.status()
        # Widgets belong to the thread of the event loop.
        self.call_from_thread(self._draw_daemon, status)

    def _draw_daemon(self, status: Mapping[str, Any] | None) -> None:
        self._daemon = status
        with contextlib.suppress(NoMatches):
            self.query_one("#daemon", Static).update(Text(daemon_line(status)))

    def on_data_table_row_highlighted(self, _event: DataTable.RowHighlighted) -> None:
        if len(self.screen_stack) == 1:
            self._draw_detail()

    def on_data_table_row_selected(self, _event: DataTable.RowSelected) -> None:
        self.action_plan()

    def action_plan(self) -> None:
        """Show the plan of the chosen row."""
        if (row := self.chosen) is not None:
            title = f"{row.name} ({self._number(row)})"
            self.push_screen(Notice(title, plan_text(row, self.view.geometry, self._policy)))

    def _number(self, row: Row) -> str:
        return f"{row.key:#x}" if self._mapped else str(row.key)

    @work
    async def action_collapse(self) -> None:
        """Collapse the chosen process, after a confirmation."""
        row, opened = self.chosen, self.view.opened
        if row is None:
            return
        if opened is None:
            self.notify("Nothing runs here: a file cannot be collapsed.", severity="warning")
            return
        if row.trouble:
            # Without markup, because an error's text may have brackets.
            self.notify(clean(row.trouble), severity="warning", markup=False)
            return
        mapped = self._mapped
        plan = replace(self.view.options, within=mapped.range_of(row.key)) if mapped else self.view.options
        title = f"Collapse {row.name} ({self._number(row)})?"
        if await self.push_screen_wait(Question(title, question_text(row, self.view.geometry, plan))):
            self._carrying = carrying = Carrying(lambda: opened(row.key), plan)
            try:
                await self.push_screen_wait(Running(f"Collapsing {row.name}", carrying, self.view.geometry))
            finally:
                # Also if the program ends before the collapse.
                carrying.stop()
                self.view.source.refresh(row.key)

    def action_sort(self) -> None:
        """Sort by the next column."""
        self.sort = SORTS[(SORTS.index(self.sort) + 1) % len(SORTS)]
        self.draw()

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        """Sort by the column that was clicked; a second click reverses the order."""
        if name := COLUMNS[event.column_index][0]:
            self.reversed = not self.reversed if name == self.sort else False
            self.sort = name
            self.draw()

    def action_reverse(self) -> None:
        """Reverse the order."""
        self.reversed = not self.reversed
        self.draw()

    def action_filter(self) -> None:
        """Ask for a text that rows must contain."""
        box = self.query_one("#filter", Input)
        box.display = True
        box.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        self.wanted = event.value
        self.draw()

    def on_input_submitted(self, _event: Input.Submitted) -> None:
        self.query_one("#filter").display = bool(self.wanted)
        self.table.focus()

    def action_show_all(self) -> None:
        """Remove the filter."""
        box = self.query_one("#filter", Input)
        box.value = ""
        box.display = False
        self.table.focus()

    def action_step(self, by: int) -> None:
        """Step through a recording; in the filter the keys move the cursor, as everywhere."""
        self._go(lambda mapped: mapped.step + by)

    def action_first(self) -> None:
        """Show the first step."""
        self._go(lambda _: 0)

    def action_last(self) -> None:
        """Show the last step."""
        self._go(lambda mapped: len(mapped.steps) - 1)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        # These keys have priority, so without this the filter would not get them.
        if action in ("step", "first", "last"):
            return bool(self._mapped and self._mapped.steps) and not isinstance(self.focused, Input)
        return True

    def _go(self, where: Callable[[Mapped], int]) -> None:
        if (mapped := self._mapped) is not None and mapped.steps:
            mapped.go(where(mapped))
            self._draw_steps()

    def action_theme(self) -> None:
        """Switch between the light and the dark theme."""
        self.theme = "textual-light" if self.current_theme.dark else "textual-dark"
        # Shades of bars depend on the theme.
        self._cells.clear()
        self.draw()

    def action_keys(self) -> None:
        """Show the keys."""
        self.push_screen(Notice("Keys", keys_text()))

    def action_leave(self) -> None:
        """Leave the program."""
        self.exit(0)

    def _end_on_signals(self) -> None:
        """Exit cleanly on SIGHUP (the terminal is closed) or SIGTERM, with the exit code of a shell."""
        for number in (signal.SIGHUP, signal.SIGTERM):
            # Only the main thread receives signals. nohup(1) sets SIGHUP to be ignored.
            if threading.current_thread() is threading.main_thread() and signal.getsignal(number) != signal.SIG_IGN:
                asyncio.get_running_loop().add_signal_handler(number, self.exit, 128 + number)

    def wait_for_collapse(self) -> None:
        """Stop a collapse that the screen has begun, and wait until its current step is finished or undone."""
        if self._carrying is not None:
            self._carrying.stop()
            self._carrying.wait()
