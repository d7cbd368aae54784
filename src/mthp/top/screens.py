"""The screens over the table: a plan, the question before a collapse, the collapse, and the keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, Label, ProgressBar, Static

from mthp.engine.report import CollapseReport
from mthp.engine.select import PlanOptions
from mthp.geometry import Geometry
from mthp.means import USUAL_MEANS, needs_move_reason, price_of_moving
from mthp.text import clean, numbered
from mthp.top.carrying import Carrying
from mthp.top.model import Row, described
from mthp.units import format_size

KEYS = (
    ("up, down, page up, page down", "choose a row"),
    ("enter, p", "its plan in full"),
    ("c", "collapse it, after a confirmation"),
    ("s, r", "sort by the next column; the other way round"),
    ("/", "show only rows with a text in their name or number; escape shows all"),
    ("left, right", "on a recording: the step before, the step after; home and end: the first, the last"),
    ("t", "light or dark"),
    ("q", "end"),
)


def plan_text(row: Row, geometry: Geometry, policy: str) -> Text:
    """Return the plan of `row` in words."""
    lines = Text()

    def line(name: str, value: str, style: str = "") -> None:
        lines.append(f"{name:<22}", style="bold")
        lines.append(clean(value) + "\n", style=style)

    line("resident", format_size(row.resident))
    if row.by_order is not None:
        line("  by folio size", described(row.by_order, geometry))
    share = row.huge_share
    pmd = geometry.label(geometry.pmd_order)
    line(f"{pmd} mapped", "not known yet" if share is None else f"{share:.1%} of the anonymous memory")
    if row.trouble:
        line("cannot be planned", row.trouble)
    elif not row.planned:
        line("plan", "not made yet")
    else:
        folios = ", ".join(f"{count:,} of {geometry.label(order)}" for order, count in row.folios.items())
        line(f"plan ({policy})", folios or "nothing to collapse")
        line("  would copy", format_size(row.gain or 0))
        line("  would add", f"{format_size(row.bloat or 0)} of bloat")
    if row.out_of_reach:
        line("out of reach", f"{format_size(row.out_of_reach)} in no whole {pmd} range: mthp collapse --small")
    return lines


def question_text(row: Row, geometry: Geometry, choice: PlanOptions) -> Text:
    """Return the plan of `row` and its consequences for the process and the machine."""
    policy = choice.policy
    text = plan_text(row, geometry, policy if isinstance(policy, str) else policy.name)
    pmd = geometry.label(geometry.pmd_order)
    below = [order for order in row.folios if order < geometry.pmd_order]

    def say(head: str, body: str) -> None:
        text.append(f"\n{head}: ", style="bold")
        text.append(body)

    if not row.planned or len(below) < len(row.folios):
        say(f"Folios of {pmd}", "by the kernel's MADV_COLLAPSE. The process waits at most for the range at hand.")
    if below or not row.planned:
        sizes = ", ".join(map(geometry.label, below)) or f"smaller than {pmd}, if the plan has any"
        say(
            f"Folios of {sizes}",
            "not made from here unless the kernel's khugepaged makes them (Linux 7.2), for which switches change for"
            " the whole system meanwhile: `mthp collapse PID --mechanism move`"
            f" {price_of_moving(1, USUAL_MEANS.max_pause_ns)}.",
        )
    return text


class Notice(ModalScreen[None]):
    """A text that escape, enter or q closes."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,enter,q,p,question_mark", "dismiss_me", "back")]

    def __init__(self, title: str, text: Text) -> None:
        super().__init__()
        self._title, self._text = title, text

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="window"):
            yield Label(Text(clean(self._title)), classes="title")
            yield Static(self._text, id="text")
            yield Label("escape: back", classes="hint")

    def action_dismiss_me(self) -> None:
        self.dismiss(None)


class Question(ModalScreen[bool]):
    """The question whether to go on: y confirms, and every key that means no declines."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "yes"),
        Binding("n,escape,q", "answer(False)", "no"),
        Binding("up,pageup", "scroll(-1)", "up"),
        Binding("down,pagedown", "scroll(1)", "down"),
    ]

    def __init__(self, title: str, text: Text) -> None:
        super().__init__()
        self._title, self._text = title, text

    def compose(self) -> ComposeResult:
        with Vertical(classes="window"):
            yield Label(Text(clean(self._title)), classes="title")
            with VerticalScroll(classes="body"):
                yield Static(self._text, id="text")
            with Horizontal(classes="buttons"):
                yield Button("No (n)", id="no")
                yield Button("Yes, collapse it (y)", id="yes", variant="warning")

    def on_mount(self) -> None:
        # Enter presses the button with the focus.
        self.query_one("#no").focus()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        self.dismiss(event.button.id == "yes")

    def action_scroll(self, by: int) -> None:
        """Scroll the text. The text does not have the focus, because enter must mean no."""
        self.query_one(".body").scroll_relative(y=by, animate=False)

    def action_answer(self, answer: bool) -> None:
        self.dismiss(answer)


class Running(ModalScreen[None]):
    """A collapse at work. Escape stops it; after the collapse has ended, escape closes this screen."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,enter", "stop_or_leave", "stop")]

    def __init__(self, title: str, carrying: Carrying, geometry: Geometry) -> None:
        super().__init__()
        self._title, self._carrying, self._geometry = title, carrying, geometry

    def compose(self) -> ComposeResult:
        with Vertical(classes="window"):
            yield Label(Text(clean(self._title)), classes="title")
            yield ProgressBar(id="progress", show_eta=False)
            with VerticalScroll(classes="body"):
                yield Static("", id="text")
            yield Label("escape: stop after the range at hand", classes="hint")

    def on_mount(self) -> None:
        self._carrying.start()
        self.set_interval(0.1, self.look)

    @property
    def at_work(self) -> bool:
        """Whether the collapse is running."""
        return self._carrying.running

    def look(self) -> None:
        """Show the progress."""
        carrying = self._carrying
        self.query_one(ProgressBar).update(total=max(carrying.total, 1), progress=carrying.done)
        text = self.query_one("#text", Static)
        if carrying.running:
            text.update("stopping ..." if carrying.stopping else carrying.progress)
            return
        self.query_one(".hint", Label).update("escape: back")
        if carrying.error is not None:
            # As Text, because Textual reads markup in a str.
            text.update(Text(clean(f"{carrying.error.message}\n{carrying.error.help}")))
        elif carrying.report is not None:
            text.update(report_text(carrying.report, self._geometry))

    def action_stop_or_leave(self) -> None:
        if self.at_work:
            self._carrying.stop()
        else:
            self.dismiss(None)


MAX_REASONS = 5
"""Most reasons for blocks not made that are shown; the command line shows all."""


def report_text(report: CollapseReport, geometry: Geometry) -> Text:
    """Return the result of a collapse in words."""
    pmd = geometry.label(geometry.pmd_order)
    made = {geometry.pmd_order: report.ranges.made} | {order: tally.made for order, tally in report.folios.items()}
    folios = ", ".join(f"{count:,} of {geometry.label(order)}" for order, count in made.items() if count)
    lines = [
        f"folios made: {folios or 'none'}",
        f"{format_size(report.copied_bytes)} copied, {format_size(report.filled_bytes)} of bloat added,"
        f" in {report.elapsed:.2f} s",
        f"{pmd} mapped: {report.before.share(geometry.pmd_order):.1%} before,"
        f" {report.after.share(geometry.pmd_order):.1%} now",
    ]
    if report.windows.count:
        lines.append(
            f"it was stopped {report.windows.count:,} times, for a median of {1000 * report.windows.p50:.2f} ms"
        )
    ranges = report.ranges
    left = [(count, pmd, result.meaning) for result, count in ranges.failed_by_result.items()]
    alone = (
        (ranges.over_budget, "filling them would exceed the bloat budget"),
        (ranges.over_copied, "copying them would exceed the budget"),
        (ranges.over_reserve, report.room),
    )
    left += [(count, pmd, why) for count, why in alone if count]
    left += [(n, geometry.label(order), needs_move_reason(report.move_price)) for order, n in report.needs_move.items()]
    for order, tally in report.folios.items():
        left += [(count, geometry.label(order), reason) for (_, reason), count in tally.failed.items()]
    # The most frequent reasons first, because few are shown.
    left.sort(key=lambda entry: -entry[0])
    lines += [f"not made: {count:,} of {size}: {reason}" for count, size, reason in left[:MAX_REASONS]]
    if len(left) > MAX_REASONS:
        lines.append(f"not made for other reasons: {sum(count for count, _, _ in left[MAX_REASONS:]):,}")
    if report.out_of_memory:
        lines.append(f"the collapse ended at the first failed charge: {report.out_of_memory}")
    if report.error is not None:
        lines.append(f"the collapse ended early: {report.error.message}")
    if report.interrupted:
        lines.append("stopped: the folios made so far are kept")
    if report.vanished:
        lines.append("the process exited meanwhile")
    return Text("\n".join(clean(line) for line in lines))


def keys_text() -> Text:
    """Return the list of keys."""
    text = Text()
    for keys, meaning in KEYS:
        text.append(f"{keys:<30}", style="bold")
        text.append(f"{meaning}\n")
    text.append(
        "\ncould gain: bytes that a collapse would bring into larger folios. A ~ marks an upper bound, until the row"
        " has a plan, which only visible rows get.\nadds: memory that the collapse would add (bloat).\n"
    )
    return text


def daemon_line(status: Mapping[str, Any] | None) -> str:
    """Return the daemon's status in one line."""
    if status is None:
        return "daemon: not running here (mthp daemon)"
    state = "paused" if status.get("paused") else "resting" if status.get("resting") else "at work"
    counters = status.get("counters", {})
    targets = status.get("targets", [])
    made = format_size(int(counters.get("collapsed_bytes", 0)))
    added = format_size(int(counters.get("bloat_bytes", 0)))
    return (
        f"daemon: process {status.get('pid', '?')}, {state}, {numbered(len(targets), 'target')},"
        f" {made} collapsed, {added} of bloat added"
    )
