"""`mthp top` on a terminal of 80 columns and 24 lines: no figure, and nothing of a question, is cut off."""

from __future__ import annotations

import html
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest

from fakes import FakeSpace
from mthp.addrspace import AddressSpace
from mthp.engine.select import PlanOptions
from mthp.geometry import X86_64
from mthp.top.mapped import Mapped
from mthp.top.model import Row
from report_spaces import redis_like

pytest.importorskip("textual")

from textual.pilot import Pilot
from textual.widgets import Static

from mthp.top.app import TopApp
from mthp.top.columns import NAME_WIDTHS, PADDING, SCROLL_BAR, column_widths
from mthp.top.screens import Notice, Question
from top_screen import Rows, drive, view
from waiting import until_shown

M = 1 << 20
SMALL = (80, 24)
SVG_COLUMN = 12.2
"""Width of a character in the pictures of rich (rich.console.Console.export_svg)."""

ROWS = [
    Row(
        4194303,
        "a-worker-of-that-name",
        (1024 << 30) - 80 * M,
        (1023 << 30) - 80 * M,
        huge=(1023 << 30) - 80 * M,
        by_order={order: 777 * M << order for order in range(10)},
        gain=(1023 << 30) - 180 * M,
        bloat=(1023 << 20) - 108 * 1024,
        folios=dict.fromkeys(range(2, 10), 1234567),
        planned=True,
    ),
    Row(7, "postgres", 777 * M, 700 * M, 350 * M, {9: 350 * M, 0: 427 * M}, gain=333 * M, bloat=11 * M),
]

STATUS: Mapping[str, Any] = {
    "pid": 4194303,
    "resting": True,
    "targets": [{}] * 1234,
    "counters": {"collapsed_bytes": 1023 << 30, "bloat_bytes": (1023 << 20) - 100 * 1024},
}


def no_space(_pid: int) -> AddressSpace:
    return FakeSpace([])


def narrow(script: Callable[[TopApp, Pilot[int]], Awaitable[None]], size: tuple[int, int] = SMALL) -> None:
    """Run `script` on a small screen of the rows."""
    drive(view(Rows(ROWS), opened=no_space, status=lambda: STATUS), script, size)


def seen(app: TopApp) -> list[str]:
    """Return the lines that are on the screen."""
    lines: dict[str, dict[int, str]] = {}
    pattern = r'<text[^>]* x="([0-9.]+)" y="([0-9.]+)"[^>]*>(.*?)</text>'
    for x, y, text in re.findall(pattern, app.export_screenshot()):
        for at, char in enumerate(html.unescape(text), round(float(x) / SVG_COLUMN)):
            lines.setdefault(y, {})[at] = char
    ordered = sorted(lines, key=float)
    return ["".join(lines[y].get(at, " ") for at in range(max(lines[y]) + 1)).replace("\xa0", " ") for y in ordered]


def figures(text: str) -> list[str]:
    return re.findall(r"(?<!\S)\S*[0-9]\S*", text)


@pytest.mark.parametrize("size", [SMALL, (60, 24), (110, 32), (200, 50)])
def test_every_figure_of_the_table_is_there_with_its_unit(size: tuple[int, int]) -> None:
    async def script(app: TopApp, pilot: Pilot[int]) -> None:
        text = "\n".join(seen(app))
        for figure in ("4194303", "1023.9G", "100.0%", "1022.8G", "1022.9M", "777M", "50.0%", "~333M", "11M"):
            assert re.search(rf"(?<!\S){re.escape(figure)}(?!\S)", text), (figure, text)
        for head in ("pid", "name", "resident", "huge", "could gain", "adds"):
            assert head in text, text

    narrow(script, size=size)


@pytest.mark.parametrize(("mapped", "narrowest"), [(False, 60), (True, 65)])
def test_the_columns_fit_every_terminal_in_which_names_have_room(mapped: bool, narrowest: int) -> None:
    for room in range(narrowest, 300):
        widths = column_widths(room, mapped=mapped)
        assert sum(widths) + PADDING * len(widths) + SCROLL_BAR <= room
        assert widths[1] >= NAME_WIDTHS[0]


def test_the_plan_and_the_daemon_below_it_are_whole() -> None:
    async def script(app: TopApp, pilot: Pilot[int]) -> None:
        text = " ".join(" ".join(seen(app)).split())
        for order in range(2, 10):
            assert f"1,234,567 of {X86_64.label(order)}" in text, text
        assert "1023G collapsed, 1022.9M of bloat added" in text, text

    narrow(script)


def test_the_columns_follow_when_the_terminal_changes() -> None:
    async def script(app: TopApp, pilot: Pilot[int]) -> None:
        await pilot.press("down")
        for width in (200, 80):
            await pilot.resize_terminal(width, 24)
            await pilot.pause()
            assert "~333M" in "\n".join(seen(app))
            assert app.chosen is not None
            assert app.chosen.key == 7

    narrow(script, size=(120, 24))


def test_a_question_shows_its_buttons_and_all_of_its_text() -> None:
    async def script(app: TopApp, pilot: Pilot[int]) -> None:
        await pilot.press("c")
        await until_shown(pilot, lambda: isinstance(app.screen, Question))
        await pilot.pause()
        first = "\n".join(seen(app))
        assert "No (n)" in first, first
        assert "Yes, collapse it (y)" in first, first
        shown = set(figures(first))
        for _ in range(30):
            await pilot.press("down")
            await pilot.pause()
            shown |= set(figures("\n".join(seen(app))))
        last = "\n".join(seen(app))
        end = str(app.screen.query_one("#text", Static).render()).split()[-1]
        assert end in last.split(), last
        assert "Yes, collapse it (y)" in last
        assert "1,234,567" in shown
        await pilot.press("n")

    narrow(script)


def test_the_steps_of_a_long_recording_are_on_one_line() -> None:
    steps = tuple(1.2345678 * step for step in range(12346))
    mapped = Mapped(lambda _step: redis_like(), PlanOptions(), steps=steps)
    mapped.start()

    async def script(app: TopApp, pilot: Pilot[int]) -> None:
        await pilot.press("end")
        await pilot.pause()
        assert any("step 12346 of 12346, 15240.7 s" in line for line in seen(app)), "\n".join(seen(app))

    try:
        drive(view(mapped), script, SMALL)
    finally:
        mapped.close()


def test_the_keys_can_be_read_to_the_end() -> None:
    async def script(app: TopApp, pilot: Pilot[int]) -> None:
        await pilot.press("question_mark")
        await until_shown(pilot, lambda: isinstance(app.screen, Notice))
        for _ in range(30):
            await pilot.press("down")
        await pilot.pause()
        assert "escape: back" in "\n".join(seen(app))

    narrow(script)
