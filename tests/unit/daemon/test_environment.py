"""Looks at targets: how often, for a given cost."""

from __future__ import annotations

import pytest

from daemon_stage import (
    FULL,
    Stage,
)
from fakes import FakeClock
from mthp.daemon.environment import LOOK_SHARE, SHORTEST_ROUND, WAKE_GRID, Looks


def test_looks_that_take_long_come_less_often_up_to_scan_sleep() -> None:
    stage = Stage(FULL)
    spent = FakeClock()
    looks = stage.environment.looks = Looks(spent)
    for number in range(299):
        looks.put(number, eligible=True)

    def looks_in(seconds: float, cost: float) -> int:
        stage.process.cost = lambda: setattr(spent, "now", spent.now + cost)
        stage.steps(3000.0)
        before = stage.target.counters.looks
        stage.steps(seconds)
        return stage.target.counters.looks - before

    assert looks_in(100.0, 1e-6) >= 99 / (SHORTEST_ROUND + WAKE_GRID)
    # 300 such targets take their share of a core.
    assert 300 * 20e-6 * looks_in(100.0, 20e-6) / 100 <= LOOK_SHARE
    assert looks_in(100.0, 0.01) == pytest.approx(100 / stage.environment.scan_sleep, abs=1)
    for number in range(299):
        looks.drop(number)
    assert looks_in(100.0, 1e-6) >= 99 / (SHORTEST_ROUND + WAKE_GRID)


def test_targets_without_a_mapping_for_folios_do_not_delay_the_others() -> None:
    stage = Stage(FULL)
    looks = stage.environment.looks = Looks(FakeClock())
    for number in range(10_000):
        looks.put(number, eligible=False)
    looks.took(1.0)
    stage.steps(10.0)
    assert looks.interval(stage.target) < looks.interval(0)
    looks.put(0, eligible=True)
    assert looks.interval(0) == looks.interval(stage.target)
