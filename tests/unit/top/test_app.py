"""The screen of `mthp top`, driven by keys. Screenshots go to the directory that MTHP_SCREENSHOTS names."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fakes import FakeSpace
from mthp.addrspace import AddressSpace
from mthp.engine.select import PlanOptions
from mthp.results import BlockOutcome
from mthp.top.mapped import Mapped
from mthp.top.model import Row
from report_spaces import HOSTILE, mixed, redis_like

pytest.importorskip("textual")

from textual.pilot import Pilot
from textual.widgets import Label, Static

from mthp.top.app import TopApp
from mthp.top.screens import Notice, Question, Running, daemon_line
from top_screen import Rows, drive, view
from waiting import until_shown

M = 1 << 20
ROWS = [
    Row(
        101,
        "redis-server",
        900 * M,
        800 * M,
        huge=200 * M,
        by_order={9: 200 * M, 4: 50 * M, 0: 650 * M},
        gain=600 * M,
        bloat=30 * M,
        folios={9: 290, 4: 12},
        planned=True,
    ),
    Row(7, "postgres", 700 * M, 100 * M, 98 * M, {9: 98 * M, 0: 602 * M}, gain=2 * M, bloat=0, planned=True),
    Row(2000, "java", 500 * M, 450 * M, huge=0, gain=450 * M),
    Row(55, "sshd", 5 * M, 1 * M, trouble="not permitted to look at it: run as root"),
    Row(66, HOSTILE[0] + "\x1b[31m[red]", 4 * M, 1 * M),
]


STATUS: Mapping[str, Any] = {
    "pid": 4242,
    "paused": False,
    "resting": False,
    "targets": [{}, {}],
    "counters": {"collapsed_bytes": 5 << 30, "bloat_bytes": 3 << 20},
}


def text_of(app: TopApp, selector: str) -> str:
    return str(app.screen.query_one(selector, Static).render())


def column(app: TopApp, at: int = 0) -> list[str]:
    return [str(app.table.get_row_at(row)[at]) for row in range(app.table.row_count)]


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    directory = Path(os.environ.get("MTHP_SCREENSHOTS") or tmp_path)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_processes_stand_by_what_could_be_gained(theme: str, screenshots: Path) -> None:
    source = Rows(ROWS)

    async def script(app: TopApp, pilot: Pilot[int]) -> None:
        if theme == "light":
            await pilot.press("t")
        assert app.current_theme.dark == (theme == "dark")
        assert column(app) == ["101", "2000", "7", "55", "66"]
        assert column(app, 4) == ["600M", "~450M", "2M", "", ""]
        assert column(app, 6)[0].count("█") == round(24 * 200 / 900)
        assert "redis" in text_of(app, "#detail") or "290 of 2M, 12 of 64K" in text_of(app, "#detail")
        assert "process 4242, at work, 2 targets, 5G collapsed" in text_of(app, "#daemon")
        app.draw()
        assert "5 processes" in text_of(app, "#head")
        assert list(source.shown) == [101, 2000, 7, 55, 66]
        path = app.save_screenshot(f"top-{theme}.svg", str(screenshots))
        assert "<svg" in Path(path).read_text("utf-8")

    drive(view(source, status=lambda: STATUS), script)


def test_keys_sort_reverse_and_filter() -> None:
    async def script(app: TopApp, pilot: Pilot[int]) -> None:
        await pilot.press("s")
        assert (app.sort, column(app)[0]) == ("resident", "101")
        await pilot.press("r")
        assert column(app)[0] == "66"
        await pilot.press("r", "slash", *"post")
        assert column(app) == ["7"]
        assert "only 'post'" in text_of(app, "#head")
        await pilot.press("enter", "escape")
        assert len(column(app)) == 5
        await pilot.press("slash", *"nobody")
        assert column(app) == []
        assert "nothing matches" in text_of(app, "#detail")

    drive(view(Rows(ROWS)), script)


def test_names_that_a_process_chose_are_shown_as_text() -> None:
    async def script(app: TopApp, pilot: Pilot[int]) -> None:
        await pilot.press("s", "s", "s", "s", "r")
        shown = "".join(column(app, 1))
        assert "\x1b" not in shown
        assert "<script" in shown
        assert "[red]" in shown

    drive(view(Rows(ROWS)), script)


def test_a_plan_comes_up_and_goes_away(screenshots: Path) -> None:
    async def script(app: TopApp, pilot: Pilot[int]) -> None:
        await pilot.press("p")
        assert isinstance(app.screen, Notice)
        assert "30M of bloat" in text_of(app, "#text")
        app.save_screenshot("top-plan.svg", str(screenshots))
        await pilot.press("escape", "question_mark")
        assert "collapse it, after a confirmation" in text_of(app, "#text")
        await pilot.press("q", "q")
        assert app.return_value == 0

    drive(view(Rows(ROWS)), script)


@pytest.mark.parametrize("answer", ["n", "escape", "enter"])
def test_nothing_is_collapsed_unless_the_answer_is_yes(answer: str) -> None:
    def opened(_pid: int) -> AddressSpace:
        raise AssertionError("it was opened")

    async def script(app: TopApp, pilot: Pilot[int]) -> None:
        await pilot.press("c")
        await until_shown(pilot, lambda: isinstance(app.screen, Question))
        # Enter presses the button that has the focus, which is no.
        await pilot.press(answer)
        await until_shown(pilot, lambda: not isinstance(app.screen, Question))
        assert not isinstance(app.screen, Running)

    drive(view(Rows(ROWS), opened=opened), script)


def test_a_collapse_runs_beside_the_screen_and_says_what_came_of_it(screenshots: Path) -> None:
    space = FakeSpace([mixed(1 << 32, 20, 0.9)])
    source, asked = Rows(ROWS), []

    def opened(pid: int) -> AddressSpace:
        asked.append(pid)
        return space

    async def script(app: TopApp, pilot: Pilot[int]) -> None:
        await pilot.press("c")
        await until_shown(pilot, lambda: isinstance(app.screen, Question))
        app.save_screenshot("top-question.svg", str(screenshots))
        await pilot.press("y")
        await until_shown(pilot, lambda: isinstance(app.screen, Running) and "copied" in text_of(app, "#text"))
        assert "before" in text_of(app, "#text")
        app.save_screenshot("top-collapsed.svg", str(screenshots))
        await pilot.press("escape")
        await until_shown(pilot, lambda: not isinstance(app.screen, Running))

    drive(view(source, opened=opened), script)
    assert asked == [101]
    assert source.refreshed == [101]
    assert space.attempts
    assert space.closed


@pytest.mark.parametrize(
    ("row", "said", "not_said"),
    [
        (ROWS[0], ("MADV_COLLAPSE", "Folios of 64K: not made from here", "--mechanism move", "an aim of 1 ms"), ()),
        (ROWS[2], ("MADV_COLLAPSE", "smaller than 2M, if the plan has any: not made from here"), ()),
        (Row(9, "[red]sh", 1, 1, gain=1, folios={9: 3}, planned=True), ("MADV_COLLAPSE",), ("--mechanism move",)),
        (Row(9, "x", 1, 1, gain=1, folios={3: 3}, planned=True), ("Folios of 32K: not made",), ("MADV_COLLAPSE",)),
    ],
)
def test_the_question_says_what_a_collapse_means(
    row: Row, said: Sequence[str], not_said: Sequence[str], screenshots: Path
) -> None:
    async def script(app: TopApp, pilot: Pilot[int]) -> None:
        await pilot.press("c")
        await until_shown(pilot, lambda: isinstance(app.screen, Question))
        asked = " ".join(text_of(app, "#text").split())
        assert [text for text in said if text not in asked] == []
        assert [text for text in not_said if text in asked] == []
        assert row.name in str(app.screen.query_one(".title", Label).render())
        app.save_screenshot("top-question-dark.svg" if row is ROWS[0] else "top-question-other.svg", str(screenshots))
        if row is ROWS[0]:
            await pilot.press("n", "t", "c")
            await until_shown(pilot, lambda: isinstance(app.screen, Question))
            app.save_screenshot("top-question-light.svg", str(screenshots))

    drive(view(Rows([row]), opened=lambda _: redis_like()), script)


def test_a_reason_why_nothing_can_be_done_is_text_whatever_is_in_it() -> None:
    trouble = "[/red] not permitted [bold"

    async def script(app: TopApp, pilot: Pilot[int]) -> None:
        await pilot.press("c")
        await until_shown(pilot, lambda: bool(app.screen.query("Toast")))
        assert trouble in str(app.screen.query_one("Toast").render())

    drive(view(Rows([Row(55, "sshd", 5 * M, 1 * M, trouble=trouble)]), opened=lambda _: redis_like()), script)


class Slow(FakeSpace):
    """Collapses one range only when it is let."""

    let: threading.Semaphore

    def attempt(self, address: int, order: int) -> BlockOutcome:
        self.let.acquire(timeout=10)
        return super().attempt(address, order)


def test_escape_stops_a_collapse_after_the_range_at_hand() -> None:
    space = Slow([mixed(1 << 32, 60, 0.95)])
    space.let = threading.Semaphore(2)

    async def script(app: TopApp, pilot: Pilot[int]) -> None:
        await pilot.press("c")
        await until_shown(pilot, lambda: isinstance(app.screen, Question))
        await pilot.press("y")
        await until_shown(pilot, lambda: len(space.attempts) == 2)
        await pilot.press("escape")
        space.let.release(100)
        await until_shown(pilot, lambda: isinstance(app.screen, Running) and "stopped" in text_of(app, "#text"))
        assert len(space.attempts) <= 4

    drive(view(Rows(ROWS), opened=lambda _: space), script)


def test_a_file_is_not_collapsed_and_the_untouchable_neither() -> None:
    async def script(app: TopApp, pilot: Pilot[int]) -> None:
        await pilot.press("c")
        await pilot.pause(0.1)
        assert not isinstance(app.screen, Question)

    drive(view(Rows(ROWS)), script)
    drive(view(Rows(ROWS[3:4]), opened=lambda _: redis_like()), script)


def test_a_recording_is_gone_through_in_time(screenshots: Path) -> None:
    spaces = [redis_like(), FakeSpace([mixed(1 << 32, 3, 0.8)], label="later")]
    mapped = Mapped(lambda step: spaces[step or 0], PlanOptions(max_ptes_none=64), steps=(0.0, 12.5))
    mapped.start()

    async def script(app: TopApp, pilot: Pilot[int]) -> None:
        assert "4711 (redis-server)" in text_of(app, "#head")
        assert "step 1 of 2, 0 s" in text_of(app, "#steps")
        assert len(column(app)) == 3
        app.save_screenshot("top-recording-dark.svg", str(screenshots))
        await pilot.press("t")
        app.save_screenshot("top-recording-light.svg", str(screenshots))
        await pilot.press("right")
        await until_shown(pilot, lambda: mapped.arrived)
        app.draw()
        assert "step 2 of 2, 12.5 s" in text_of(app, "#steps")
        assert column(app) == ["100000000"]
        await pilot.press("home")
        assert mapped.step == 0
        await pilot.press("slash", "left")
        assert mapped.step == 0

    try:
        drive(view(mapped), script)
    finally:
        mapped.close()


def test_thousands_of_rows_stay_quick_to_draw_and_keep_the_cursor() -> None:
    source = Rows([Row(pid, f"p{pid}", pid * M, pid * M, huge=0, gain=pid * M) for pid in range(1, 4001)])

    async def script(app: TopApp, pilot: Pilot[int]) -> None:
        assert app.table.row_count == 1000
        assert len(source.shown) < 40
        await pilot.press("down", "down", "down")
        source.known[0] = Row(1, "p1", M, M, huge=0, gain=9999 * M)
        app.draw()
        assert column(app)[0] == "1"
        assert app.table.cursor_row == 3

    drive(view(source), script)


def test_a_tick_while_the_screen_is_taken_down_is_not_an_error() -> None:
    async def script(app: TopApp, pilot: Pilot[int]) -> None:
        await app.query_one("#head").remove()
        await app.query_one("#daemon").remove()
        app._draw_again()
        app._draw_daemon(None)

    drive(view(Rows(ROWS)), script)


def test_no_daemon_is_said() -> None:
    assert "not running" in daemon_line(None)
    assert "paused" in daemon_line(dict(STATUS) | {"paused": True})
