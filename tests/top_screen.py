"""The screen of `mthp top` over rows of a test, driven by keys."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from textual.pilot import Pilot

from mthp.engine.select import PlanOptions
from mthp.geometry import X86_64
from mthp.top.app import TopApp
from mthp.top.model import Row
from mthp.top.survey import View


class Rows:
    """A source with the rows of the test.

    Attributes:
        known: the rows.
        shown: keys of the rows on the screen.
        refreshed: keys of the rows that were to be read again.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.known = list(rows)
        self.shown: Sequence[int] = ()
        self.refreshed: list[int] = []

    def rows(self) -> Sequence[Row]:
        return self.known

    def show(self, keys: Sequence[int]) -> None:
        self.shown = keys

    def refresh(self, key: int) -> None:
        self.refreshed.append(key)

    def close(self) -> None:
        return


def view(source: Any, **options: Any) -> View:
    """Return what the screen shows of a source."""
    switches = "Linux 6.18.44, enabled: madvise; inherit: 2M; never: 1M 512K 256K 128K 64K 32K 16K"
    return View("mthp top", source, X86_64, PlanOptions(max_ptes_none=64), switches=switches, **options)


def drive(
    shown: View, script: Callable[[TopApp, Pilot[int]], Awaitable[None]], size: tuple[int, int] = (110, 32)
) -> None:
    """Run `script` on a screen of `size`, once it is drawn."""

    async def run() -> None:
        app = TopApp(shown)
        async with app.run_test(size=size, notifications=True) as pilot:
            await pilot.pause()
            await app.workers.wait_for_complete()
            await pilot.pause()
            await script(app, pilot)

    asyncio.run(run())
