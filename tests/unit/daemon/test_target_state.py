"""The state of a target between passes: signs of change, heat, small folios."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from daemon_stage import (
    BLOCK,
    EMPTY,
    FULL,
    HALF,
    HUGE,
    START,
    FakeProcess,
    G,
    N,
    Stage,
    small_stage,
)
from fakes import FakeSpace
from mthp.daemon.target_state import Sign
from mthp.heat import Heat, HeatRequest
from mthp.objects import to_object
from mthp.ptes import ORDER_NONE, Pte
from mthp.tunables import Switches
from waiting import until


def test_faults_and_mappings_are_read_whatever_the_name_is() -> None:
    process = FakeProcess()
    sign = Sign.parse(process.read("stat"))
    assert (sign.faults, sign.mapped, sign.resident, sign.comm) == (103, 8_000_000, 50_000, b"a (b) c")


def test_small_folios_that_khugepaged_makes_huge_again_are_told_of_once_with_the_remedy() -> None:
    stage = small_stage("split", BLOCK, BLOCK, orders=(4,), max_ptes_none=0)
    for _ in range(5):
        stage.process.faults += 1
        stage.steps(5.0)
    told = to_object(stage.target, G)["remade"]
    assert (told["remade_ranges"], told["keeps"]) == (2, N - 16 - 1)
    (line,) = stage.said
    assert f"keep_max_ptes_none = {N - 16 - 1}" in line
    # Another size is switched off: nothing is made huge any more, and no message is printed.
    stage.space._switches = Switches("never", {9: "never"})
    stage.target.stale()
    stage.steps(5.0)
    assert to_object(stage.target, G)["remade"]["remade_ranges"] == 0


class Measured(FakeSpace):
    """Memory of which the third PMD range is used."""

    def measure_heat(self, request: HeatRequest, stop: Callable[[], bool]) -> Heat:
        start = np.array([START + 2 * G.pmd_size], np.uint64)
        return Heat.of_spans(start, start + np.uint64(G.pmd_size), np.array([9.0]))


def test_what_is_used_comes_first_once_that_is_known() -> None:
    stage = Stage(FULL, FULL, HALF, FULL, heat=HeatRequest("damon", 1.0))
    stage.space.__class__ = Measured
    stage.target.step()
    assert stage.collapsed == []
    until(lambda: not stage.target.heat.measuring, "the heat")
    stage.steps(30.0)
    assert stage.collapsed == [2, 0, 1, 3]


def test_what_copy_on_write_broke_up_comes_first_after_a_measurement_of_heat_too() -> None:
    stage = Stage(HUGE, HUGE, EMPTY, heat=HeatRequest("damon", 1.0), max_ptes_none=511)
    stage.space.__class__ = Measured
    stage.steps(1.0)
    stage.target.forks.began(8, stage.now)
    stage.space.write(START, Pte.PRESENT, 0, pages=N // 2)
    stage.space.write(START + G.pmd_size // 2, 0, ORDER_NONE, pages=N // 2)
    # Fuller, and used.
    stage.space.write(START + 2 * G.pmd_size, Pte.PRESENT, 0, pages=N)
    stage.now += 5.0
    assert stage.target.forks.ended(8, stage.now)
    stage.target.next_at = stage.now
    stage.target.step()
    assert stage.collapsed == []
    until(lambda: not stage.target.heat.measuring, "the heat")
    stage.steps(30.0)
    assert stage.collapsed == [0, 2]


def test_without_a_source_of_heat_fullness_decides() -> None:
    stage = Stage(HALF, FULL, heat=HeatRequest("damon", 1.0))
    stage.target.step()
    until(lambda: not stage.target.heat.measuring, "the attempt")
    stage.steps(30.0)
    assert stage.collapsed == [1, 0]
    assert stage.target.heat.heat is None
