"""`mthp top` on live processes: its figures are the kernel's, and its collapse works."""

from __future__ import annotations

import asyncio
import os

import pytest

from e2e.helpers import COUNTER_ERROR, Actor, memory_of

pytest.importorskip("textual")

from mthp.cli.top_command import view_of
from mthp.engine.select import PlanOptions
from mthp.top.app import TopApp
from mthp.top.looks import first_look, second_look, third_look
from mthp.top.screens import Question, Running
from waiting import until_shown

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("thp_switches")]

SIZE = 16 << 20


@pytest.mark.requires("root", "thp", "4k-pages", "pagemap_scan")
def test_the_three_looks_agree_with_smaps() -> None:
    with Actor() as actor:
        actor.fill(actor.map(SIZE), SIZE >> 12)
        row = next(row for row in first_look() if row.key == actor.pid)
        kernel = memory_of(actor.pid)
        assert abs(row.resident - kernel.rss) < (4 << 20) + COUNTER_ERROR
        second = second_look(row)
        assert abs(second.resident - kernel.rss) < 1 << 20
        assert second.huge == kernel.anon_huge
        third = third_look(second, PlanOptions())
        assert third.planned
        assert (third.gain or 0) >= SIZE - kernel.anon_huge
        assert sum((third.by_order or {}).values()) == third.resident


@pytest.mark.slow
@pytest.mark.requires("root", "thp", "4k-pages", "pagemap_scan")
def test_a_mapping_is_collapsed_from_the_screen() -> None:
    with Actor() as actor:
        address = actor.map(SIZE)
        actor.fill(address, SIZE >> 12)
        view = view_of(str(actor.pid), PlanOptions(policy="pmd-only"), 0.5)

        async def drive() -> None:
            app = TopApp(view)
            async with app.run_test(size=(110, 32)) as pilot:
                await pilot.pause()
                chosen = app.chosen
                assert chosen is not None
                assert chosen.key <= address < chosen.key + (64 << 20)
                await pilot.press("c")
                for wanted in (Question, Running):
                    await until_shown(pilot, lambda wanted=wanted: isinstance(app.screen, wanted))  # type: ignore[misc]
                    if wanted is Question:
                        await pilot.press("y")
                running = app.screen
                assert isinstance(running, Running)
                await until_shown(pilot, lambda: not running.at_work)
                await pilot.press("escape")

        try:
            asyncio.run(drive())
        finally:
            view.source.close()
        assert memory_of(actor.pid).anon_huge >= SIZE - (2 << 20)
        assert actor.damaged(address, SIZE >> 12) == 0


def test_it_finds_itself() -> None:
    assert any(row.key == os.getpid() and "this mthp" in row.name for row in first_look())
