"""What record says of steps that came late."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mthp.cli.record_command import _late
from mthp.snapshot.recorder import OVER, Recorded

DONE = Recorded("r", "7 (a)", 4, 1.5, 4096, 0.1, OVER, 0.5, ())


@pytest.mark.parametrize(
    ("done", "duration", "said"),
    [
        (DONE, 2.0, ""),
        (replace(DONE, seconds=2.7), 2.0, "steps came every 0.9 s, not 0.5 s: --cpu 2.0% allows no more"),
        (replace(DONE, steps=1, seconds=0.0), 2.0, "no second step fitted into 2 s: --cpu 2.0% allows no more"),
        # One step is all that was requested, or all that there was time for.
        (replace(DONE, steps=1, seconds=0.0), 0.4, ""),
        (replace(DONE, steps=1, seconds=0.0, end="stopped"), None, ""),
    ],
)
def test_late_steps_are_reported(done: Recorded, duration: float | None, said: str) -> None:
    assert _late(done, duration, 0.02) == said
