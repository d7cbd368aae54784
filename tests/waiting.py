"""Waiting in tests: for conditions, never for times.

The only time here is a limit on the waiting, after which a test gives up. It is not a measure of speed, because a slow,
cold or busy machine needs many times longer than an idle one. On an emulated one, MTHP_TEST_PATIENCE multiplies the
limit, and the pauses that tests allow the mover.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from textual.pilot import Pilot

FACTOR = float(os.environ.get("MTHP_TEST_PATIENCE", "1"))
PATIENCE = 120.0 * FACTOR
"""Seconds after which something will not happen any more."""


def wait_for(condition: Callable[[], object], seconds: float = PATIENCE) -> bool:
    """Return whether `condition` comes true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def until(condition: Callable[[], object], what: str | Callable[[], str]) -> None:
    """Return once `condition` is true; the error names `what`."""
    assert wait_for(condition), f"waited in vain for {what if isinstance(what, str) else what()}"


async def until_shown(pilot: Pilot[Any], condition: Callable[[], object]) -> None:
    """Return once `condition` is true in the application that `pilot` drives."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await pilot.pause(0.02)
