"""Budgets, with a clock that the test sets and a price for every wake."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import FakeClock
from mthp.pacing import BYTES_SLICE_SECONDS, CPU_BURST, CPU_SLICE, Backoff, Budget, ByteBudget, CpuBudget

BURST, WORTH = 1.0, 0.2


@given(rate=st.floats(0.01, 100), amounts=st.lists(st.floats(0.001, 5), min_size=1, max_size=30))
def test_a_budget_is_never_overspent_by_more_than_one_piece(rate: float, amounts: list[float]) -> None:
    clock = FakeClock()
    budget = Budget(rate, BURST, WORTH, clock)
    begun, spent = clock.now, 0.0
    for amount in amounts:
        clock.now += budget.wait()
        assert budget.wait() == 0
        spent += amount
        budget.spend(amount)
        assert spent <= BURST + rate * (clock.now - begun) + amount + 1e-6


@given(rate=st.floats(0.01, 100), amount=st.floats(0.001, 5), shares=st.lists(st.floats(0.01, 0.99), max_size=5))
def test_a_wait_that_is_cut_short_goes_on_until_the_slice_is_saved(
    rate: float, amount: float, shares: list[float]
) -> None:
    clock = FakeClock()
    budget = Budget(rate, BURST, WORTH, clock)
    budget.spend(BURST + amount)
    whole = budget.wait()
    assert whole * rate >= WORTH + amount
    for share in shares:
        left = budget.wait()
        clock.now += share * left
        assert budget.wait() == pytest.approx((1 - share) * left, abs=2e-4)
    clock.now += budget.wait()
    assert budget.wait() == 0
    # The slice may be spent in small pieces, without a wait between them.
    for _ in range(4):
        budget.spend(WORTH / 5)
        assert budget.wait() == 0


def test_a_budget_without_a_rate_never_waits() -> None:
    budget = ByteBudget(None, FakeClock())
    budget.spend(1e12)
    assert budget.wait() == 0


def test_an_overdrawn_budget_whose_rate_is_lifted_and_set_again_goes_on() -> None:
    clock = FakeClock()
    budget = ByteBudget(100.0, clock)
    budget.spend(1000)
    assert budget.wait() > 9
    budget.set_rate(None)
    assert budget.wait() == 0
    budget.set_rate(100.0)
    assert budget.wait() == pytest.approx(BYTES_SLICE_SECONDS, rel=0.01)


def test_the_cpu_time_of_all_threads_counts() -> None:
    clock, used = FakeClock(), FakeClock()
    cpu = CpuBudget(0.1, clock, used)
    used.now += CPU_BURST + 0.1
    assert cpu.wait() == pytest.approx(1.0 + CPU_SLICE / 0.1, rel=0.01)
    clock.now += 1.3
    assert cpu.wait() == 0
    cpu.set(0.5)
    used.now += 1.0
    assert cpu.wait() == pytest.approx(2.0, rel=0.1)


def test_what_a_thread_spends_that_is_left_out_does_not_count() -> None:
    clock, used, answering = FakeClock(), FakeClock(), FakeClock()
    ended: list[bool] = []

    def read(_: int) -> float:
        if ended:
            raise OSError("the clock of a thread that has ended")
        return answering.now

    cpu = CpuBudget(0.1, clock, used, read=read)
    cpu.leave_out()
    used.now += 100.0
    answering.now += 100.0
    assert cpu.wait() == 0
    ended.append(True)
    assert cpu.wait() == 0
    used.now += CPU_BURST + 0.1
    assert cpu.wait() > 1.0


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("wake", [0.00005, 0.0005, 0.002])
@pytest.mark.parametrize("piece", [0.00001, 0.001, 0.1])
def test_waking_up_leaves_the_budget_for_work(share: float, wake: float, piece: float) -> None:
    """A thread that sleeps until it has earned anything at all uses its whole budget to find that out."""
    clock, used = FakeClock(), FakeClock()
    cpu = CpuBudget(share, clock, used)
    used.now += CPU_BURST
    begun, spent, worked, wakes = clock.now, used.now, 0.0, 0
    while clock.now - begun < 100 / share * CPU_SLICE:
        if wait := cpu.wait():
            clock.now += wait + wake
            used.now += wake
            wakes += 1
        else:
            clock.now += piece
            used.now += piece
            worked += piece
    earned = share * (clock.now - begun)
    assert used.now - spent <= earned + piece + wake
    assert worked >= 0.85 * earned
    assert wakes <= 1 + earned / CPU_SLICE


def test_a_clock_that_goes_back_earns_nothing_and_breaks_nothing() -> None:
    clock = FakeClock()
    budget = Budget(1.0, 1.0, 0.0, clock)
    budget.spend(2.0)
    clock.now -= 500
    assert budget.wait() == pytest.approx(1.0, rel=0.01)


def test_a_rest_doubles_with_every_failure_and_failures_within_it_do_not_count() -> None:
    known, now, waits = Backoff(), 0.0, []
    for _ in range(9):
        known.failed(now, 60.0, 3600.0)
        begun = now
        while known.rests(now):
            known.failed(now, 60.0, 3600.0)
            now += 30.0
        waits.append(now - begun)
    assert waits[:3] == [60.0, 120.0, 240.0]
    assert waits[-1] == 3600.0
