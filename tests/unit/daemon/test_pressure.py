"""Pressure and free folios, with a clock that the test sets."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fakes import FakeClock
from mthp.daemon.eagerness import (
    Shortage,
)
from mthp.daemon.pressure import ASK_SECONDS, REACH_SECONDS, FreeFolios, MachineReach, MemoryPressure, measured
from mthp.linux.abi import KPF_ANON, KPF_BUDDY, KPF_LRU


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


def test_a_refusal_is_the_machines_fault_only_if_it_has_no_such_folio(tmp_path: Path) -> None:
    clock, file = FakeClock(), tmp_path / "buddyinfo"
    file.write_text(buddyinfo(*[0] * 10, 1))
    (tmp_path / "zoneinfo").write_text("Node 0, zone   Normal\n        min      1000\n")
    free = FreeFolios(file, clock)
    free.refused(4, alloc_sleep=6.0)
    assert free.exhausted() == []
    file.write_text(buddyinfo(984, 0, 0, 0, 1))
    free.refused(4, alloc_sleep=6.0)
    assert free.exhausted() == [4]


def test_what_the_machine_could_have_huge_is_read_once_a_minute(tmp_path: Path) -> None:
    clock = FakeClock()
    reach = MachineReach(9, tmp_path, clock)
    assert reach.shares() == {}
    page = os.sysconf("SC_PAGESIZE")
    huge = page << 9
    (tmp_path / "meminfo").write_text(f"AnonPages: {10 * huge >> 10} kB\nAnonHugePages: {2 * huge >> 10} kB\n")
    (tmp_path / "buddyinfo").write_text(buddyinfo(1024, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1))
    (tmp_path / "zoneinfo").write_text(
        f"Node 0, zone   Normal\n        min      9\n        spanned  {20 * 512}\n  start_pfn: 0\n"
    )
    assert reach.shares() == {}
    clock.now += REACH_SECONDS
    # Two huge already, and three free folios.
    assert reach.shares() == {"now": 0.5}
    # Three folios are free, half of four blocks, and pages of programs fill the others.
    free, used = np.uint64(KPF_BUDDY), np.uint64(KPF_LRU | KPF_ANON)
    words = np.full((20, 512), used)
    words[:3], words[3:7, ::2] = free, free
    (tmp_path / "kpageflags").write_bytes(words.tobytes())
    clock.now += REACH_SECONDS
    assert reach.shares() == {"now": 0.5, "after_compaction": 1.0}
    (tmp_path / "meminfo").write_text("")
    assert reach.shares() == {"now": 0.5, "after_compaction": 1.0}
    clock.now += REACH_SECONDS
    assert reach.shares() == {}


@pytest.mark.parametrize(
    ("root", "membership", "pressure"),
    [
        ("/", "1:cpu:/x\n0::/own/it\n", 0.125),
        ("/", "0::/\n", 0.03),
        # A name that would be a line of its own where lines ended at a carriage return.
        ("/", "0::/none\r0::/own/it\n", 0.03),
        # In a cgroup namespace: with the mounts of the host, and with its own.
        ("/../..", "0::/../../own/it\n", 0.125),
        ("/", "0::/../own/it\n", 0.03),
    ],
)
def test_the_cgroups_own_pressure_is_measured(tmp_path: Path, root: str, membership: str, pressure: float) -> None:
    cgroups = tmp_path / "cgroups"
    (cgroups / "own/it").mkdir(parents=True)
    (tmp_path / "pressure").mkdir()
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mountinfo").write_text(f"30 24 0:26 {root} {cgroups} ro - cgroup2 cgroup2 ro\n")
    (cgroups / "own/it/memory.pressure").write_text("some avg10=12.50 avg60=0.00 avg300=0.00 total=0\n")
    (cgroups / "memory.pressure").write_text("some avg10=99.00 avg60=0.00 avg300=0.00 total=0\n")
    (tmp_path / "pressure/memory").write_text("some avg10=3.00 avg60=0.00 avg300=0.00 total=0\n")
    (tmp_path / "meminfo").write_text("MemTotal:       1000 kB\nMemAvailable:    250 kB\n")
    assert measured(membership, tmp_path) == Shortage(pressure, 0.25)


def test_a_machine_that_shows_nothing_has_no_pressure(tmp_path: Path) -> None:
    assert measured("0::/../gone\n", tmp_path) == Shortage()
