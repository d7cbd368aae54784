"""Limits of added and free memory: a sparse target in a memory cgroup survives, and grows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import mthp as library
from daemons import RunningDaemon
from e2e.helpers import Actor, memory_of, mthp_here, mthp_json_here
from memory_cgroups import MemoryCgroup, memory_cgroup
from mthp.linux.live import open_live
from targets import PAGE_SIZE, PMD_ORDER, PMD_SIZE
from waiting import until

pytestmark = [
    pytest.mark.usefixtures("no_sizes"),
    pytest.mark.live,
    pytest.mark.requires("root", "thp", "mthp", "pagemap_scan", "4k-pages"),
]

MIB = 1 << 20
LIMIT, MAPPED, STEP, GROWTH, RESERVE = 400 * MIB, 1 << 30, 128 << 10, 40 * MIB, 64 * MIB
PAGES = MAPPED // STEP
"""A page in each 128K of 1 GiB: 32M are resident, and a collapse of all would add the rest."""

PMD = ("--orders", f"order={PMD_ORDER}")


@pytest.fixture
def cgroup() -> Iterator[MemoryCgroup]:
    with memory_cgroup() as group:
        group.limit(LIMIT)
        yield group


class Sparse(Actor):
    """The target."""

    def __init__(self, cgroup: MemoryCgroup) -> None:
        super().__init__()
        cgroup.enter(self.pid)
        self.address = self.map(MAPPED)
        self.fill(self.address, PAGES, STEP // PAGE_SIZE)
        self.room = self.map(GROWTH)

    def grows(self) -> bool:
        """Use as much more memory; return whether it lives and all of its bytes are right."""
        self.fill(self.room, GROWTH // PAGE_SIZE)
        damaged = self.damaged(self.address, PAGES, STEP // PAGE_SIZE) + self.damaged(self.room, GROWTH // PAGE_SIZE)
        return damaged == 0


@pytest.fixture
def sparse(cgroup: MemoryCgroup) -> Iterator[Sparse]:
    with Sparse(cgroup) as actor:
        yield actor


@pytest.mark.slow
def test_the_defaults_leave_a_target_room_to_grow(cgroup: MemoryCgroup, sparse: Sparse) -> None:
    resident = memory_of(sparse.pid).rss
    report = mthp_json_here("collapse", sparse.pid, *PMD, code=1)
    assert report["bloat_bytes"] <= resident // 10
    assert report["over_budget_ranges"] >= 500
    assert memory_of(sparse.pid).rss <= resident + resident // 10
    assert cgroup.used <= LIMIT - RESERVE
    assert sparse.grows()


def test_the_library_has_the_same_defaults(sparse: Sparse) -> None:
    report = library.collapse(sparse.pid, orders=[PMD_ORDER])
    assert report.filled_bytes <= memory_of(sparse.pid).rss // 10
    assert report.ranges.over_budget >= 500
    assert not report.complete
    assert sparse.grows()


@pytest.mark.slow
def test_no_budget_lifts_the_reserve(cgroup: MemoryCgroup, sparse: Sparse) -> None:
    report = mthp_json_here("collapse", sparse.pid, *PMD, "--max-bloat", "none", code=1)
    assert report["collapsed_ranges"] > 100
    assert report["over_reserve_ranges"] > 100
    assert report["over_budget_ranges"] == 0
    assert str(cgroup.directory) in report["room"]
    assert "64M of it must stay free" in report["room"]
    assert cgroup.used <= LIMIT - RESERVE
    assert sparse.grows()
    text = mthp_here("collapse", sparse.pid, *PMD, "--max-bloat", "none").stdout
    assert "no room" in text
    assert "--reserve" in text


def test_the_limit_of_a_cgroup_above_counts(cgroup: MemoryCgroup) -> None:
    with Sparse(cgroup.below("inner")) as sparse:
        report = mthp_json_here("collapse", sparse.pid, *PMD, "--max-bloat", "none", code=1)
        assert report["over_reserve_ranges"] > 100
        assert cgroup.used <= LIMIT - RESERVE
        assert sparse.grows()


def test_the_reserve_can_be_chosen(cgroup: MemoryCgroup, sparse: Sparse) -> None:
    half = mthp_json_here("collapse", sparse.pid, *PMD, "--max-bloat", "none", "--reserve", "50%", code=1)
    assert 0 < half["collapsed_ranges"] < 100
    assert cgroup.used <= LIMIT // 2
    more = mthp_json_here("collapse", sparse.pid, *PMD, "--max-bloat", "none", "--reserve", "100M", code=1)
    assert more["collapsed_ranges"] > 0
    assert LIMIT // 2 < cgroup.used <= LIMIT - 100 * MIB
    assert sparse.grows()


def test_the_first_failed_charge_ends_it(cgroup: MemoryCgroup, sparse: Sparse) -> None:
    report = mthp_json_here("collapse", sparse.pid, *PMD, "--max-bloat", "none", "--reserve", 0, code=1)
    # Where the measured room ends before a charge fails, that ends it too.
    failed = report["failed_ranges"].get("CGROUP_CHARGE_FAIL", 0) + report["failed_ranges"].get(
        "ALLOC_HUGE_PAGE_FAIL", 0
    )
    assert failed <= 1
    assert bool(report["out_of_memory"]) == bool(failed)
    assert failed or report["over_reserve_ranges"] > 100
    assert sparse.damaged(sparse.address, PAGES, STEP // PAGE_SIZE) == 0


def test_a_plan_says_what_of_it_would_be_done(sparse: Sparse) -> None:
    resident = memory_of(sparse.pid).rss
    plan = mthp_json_here("plan", sparse.pid, *PMD)
    allowed = plan["by_default"]
    assert plan["bloat_bytes"] > 900 * MIB
    assert allowed["bloat_bytes"] <= allowed["bloat_budget_bytes"] <= resident // 10
    [left] = [left for left in allowed["left"] if left["order"] == PMD_ORDER]
    assert left["folios"] + allowed["folios_by_order"].get(str(PMD_ORDER), 0) == plan["folios_by_order"][str(PMD_ORDER)]
    assert "--max-bloat 10%" in left["reason"]
    report = mthp_json_here("collapse", sparse.pid, *PMD, code=1)
    assert report["collapsed_ranges"] == allowed["folios_by_order"].get(str(PMD_ORDER), 0)
    text = mthp_here("plan", sparse.pid, *PMD).stdout
    assert "It would leave" in text
    dry = mthp_json_here("collapse", sparse.pid, *PMD, "--max-bloat", "none", "--dry-run")
    assert "must stay free" in dry["allowed"]["left"][0]["reason"]


@pytest.mark.requires("mover")
def test_moving_keeps_to_the_reserve(cgroup: MemoryCgroup, sparse: Sparse) -> None:
    words = ("--orders", "64K", "--mechanism", "move", "--fill", "--pause-share", 1.0, "--max-pause", "20ms")
    report = json.loads(mthp_here("collapse", sparse.pid, *words, "--max-bloat", "none", "--json").stdout)
    tally = report["folios"]["4"]
    assert tally["made"] > 1000
    # The mover needs room for a whole window, and refuses where there is less.
    kept = sum(each["folios"] for each in tally["reasons"] if "must stay free" in each["reason"])
    assert tally["over_reserve"] + kept > 100
    assert cgroup.used <= LIMIT - RESERVE
    assert sparse.grows()
    counts = tally["made"] + tally["unchanged"] + sum(tally["failed"].values()) + tally["over_budget"]
    assert counts + tally["over_reserve"] + tally["not_tried"] == tally["planned"]


@pytest.mark.parametrize(
    ("bloat", "reason"), [pytest.param("10%", None, marks=pytest.mark.slow), ("none", "must stay free")]
)
def test_the_daemon_keeps_to_both(
    cgroup: MemoryCgroup, sparse: Sparse, tmp_path: Path, bloat: str, reason: str | None
) -> None:
    resident = memory_of(sparse.pid).rss
    words = ("--pid", str(sparse.pid), "--orders", "2M", "--max-bloat", bloat, "--cpu", "100%")
    with RunningDaemon(tmp_path / "run", *words) as daemon:
        until(lambda: (daemon.target(sparse.pid) or {}).get("passes", 0) >= 2, "some passes")
        target = daemon.target(sparse.pid)
        assert target is not None
        if reason is not None:
            until(lambda: any(reason in said for said in (daemon.target(sparse.pid) or {})["reasons"]), "the reason")
            assert target["bloat_bytes"] > resident // 5
        else:
            assert target["bloat_bytes"] <= resident // 9
        assert cgroup.used <= LIMIT - RESERVE
        assert sparse.grows()


def test_the_bounds_of_a_process_are_those_of_its_cgroups(cgroup: MemoryCgroup, sparse: Sparse) -> None:
    with open_live(sparse.pid) as space:
        bounds = {bound.name: bound for bound in space.memory_bounds()}
        assert bounds[str(cgroup.directory)].limit == LIMIT
        assert abs(bounds[str(cgroup.directory)].left - (LIMIT - cgroup.used)) < 2 * PMD_SIZE
        assert abs(space.resident_bytes() - memory_of(sparse.pid).rss) < 2 * PMD_SIZE
