"""New processes, left alone until they have settled."""

from __future__ import annotations

from fakes import FakeClock
from mthp.daemon.processes import AT_A_TIME, Nursery


def test_new_processes_are_left_alone_until_they_have_settled() -> None:
    clock = FakeClock()
    clock.now = 0.0
    nursery = Nursery(0.04, clock)
    nursery.add([5, 6])
    assert nursery.take() == []
    assert nursery.next_due() == 0.04
    clock.now = 0.03
    nursery.add([6])
    nursery.drop([99])
    clock.now = 0.05
    assert nursery.take() == [5]
    clock.now = 0.08
    assert nursery.take() == [6]
    assert nursery.next_due() is None


def test_a_storm_of_short_lived_processes_is_never_looked_into() -> None:
    clock = FakeClock()
    clock.now = 0.0
    nursery = Nursery(0.04, clock)
    for pid in range(10_000):
        nursery.add([pid])
        nursery.drop([pid])
    clock.now = 1.0
    assert nursery.take() == []
    assert len(nursery) == 0
    nursery.add(range(1000), at_once=True)
    assert len(nursery.take()) == AT_A_TIME
