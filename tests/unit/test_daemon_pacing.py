"""Budgets, pressure and free folios, with a clock that the test sets."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mthp.daemon.pacing import ASK_SECONDS, CPU_BURST, Budget, CpuBudget, FreeFolios, MemoryPressure


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(rate=st.floats(0.01, 100), amounts=st.lists(st.floats(0.001, 5), min_size=1, max_size=30))
def test_a_budget_is_never_overspent_by_more_than_one_piece(rate: float, amounts: list[float]) -> None:
    clock = FakeClock()
    budget = Budget(rate, 1.0, clock)
    begun, spent = clock.now, 0.0
    for amount in amounts:
        clock.now += budget.wait()
        assert budget.wait() == 0
        spent += amount
        budget.spend(amount)
        assert spent <= 1.0 + rate * (clock.now - begun) + amount + 1e-6


def test_a_budget_without_a_rate_never_waits() -> None:
    budget = Budget(None, 0.0, FakeClock())
    budget.spend(1e12)
    assert budget.wait() == 0


def test_cpu_time_is_counted_whoever_uses_it() -> None:
    clock, used = FakeClock(), FakeClock()
    cpu = CpuBudget(0.1, clock, used)
    used.now += CPU_BURST + 0.1
    assert cpu.wait() == pytest.approx(1.0, rel=0.01)
    clock.now += 1.1
    assert cpu.wait() == 0
    cpu.set(0.5)
    used.now += 1.0
    assert cpu.wait() == pytest.approx(2.0, rel=0.1)


def test_a_clock_that_goes_back_earns_nothing_and_breaks_nothing() -> None:
    clock = FakeClock()
    budget = Budget(1.0, 1.0, clock)
    budget.spend(2.0)
    clock.now -= 500
    assert budget.wait() == pytest.approx(1.0, rel=0.01)


def test_it_rests_under_pressure_until_that_has_eased_well(tmp_path: Path) -> None:
    clock, file = FakeClock(), tmp_path / "memory"
    pressure = MemoryPressure(0.10, file, clock)

    def at(percent: float) -> bool:
        file.write_text(f"some avg10={percent:.2f} avg60=0.00 avg300=0.00 total=1\nfull avg10=99.00 avg60=0.00\n")
        clock.now += ASK_SECONDS
        return pressure.rests()

    assert [at(5), at(11), at(8), at(4), at(8)] == [False, True, True, False, False]
    file.unlink()
    clock.now += ASK_SECONDS
    assert not pressure.rests()


def buddyinfo(*counts: int) -> str:
    return "Node 0, zone   Normal " + " ".join(f"{count:6}" for count in counts) + "\n"


def test_an_order_of_which_there_is_no_block_is_not_asked_for(tmp_path: Path) -> None:
    clock, file = FakeClock(), tmp_path / "buddyinfo"
    file.write_text(buddyinfo(9, 9, 9, 9, 1, 0, 0))
    free = FreeFolios(file, clock)
    assert [free.available(order) for order in (2, 4, 5, 9)] == [True, True, False, False]
    file.write_text(buddyinfo(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3))
    clock.now += ASK_SECONDS
    assert free.available(9)
    file.unlink()
    clock.now += ASK_SECONDS
    assert free.available(9)


def test_a_refused_order_rests_twice_as_long_each_time_up_to_alloc_sleep(tmp_path: Path) -> None:
    clock = FakeClock()
    free = FreeFolios(tmp_path / "none", clock)
    rests = []
    for _ in range(5):
        free.refused(4, alloc_sleep=6.0)
        assert free.exhausted() == [4]
        begun = clock.now
        while not free.available(4):
            clock.now += 0.5
        rests.append(clock.now - begun)
    assert rests == [1, 2, 4, 6, 6]
    assert free.available(9)
    free.given(4)
    free.refused(4, alloc_sleep=6.0)
    clock.now += 1
    assert free.available(4)
