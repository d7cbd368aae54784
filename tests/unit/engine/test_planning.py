"""Plans of an address space: exactly plan_ranges on the planes of each mapping."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import mthp
from fakes import FakeSpace, page_runs
from mthp.addrspace import AddressSpace
from mthp.engine.planning import plan_space
from mthp.engine.select import PlanOptions
from mthp.engine.space_plan import SpacePlan
from mthp.errors import TargetVanishedError
from mthp.geometry import GEOMETRIES, X86_64, Geometry, geometry_named
from mthp.ptes import ORDER_NONE, Pte, Segment, without
from mthp.results import ScanResult
from mthp.tunables import Switches, Tunables
from mthp.vma import Vma, VmaKind
from strategies import examples

BASE = 1 << 40
"""A multiple of every geometry's PMD size."""

POLICIES = ("pmd-only", "rfc", "rfc2", "per-order", "mainline")
PPC = geometry_named("ppc64-64k")

PALETTE: tuple[tuple[int, int], ...] = (
    (0, ORDER_NONE),
    (Pte.PRESENT, 0),
    (Pte.PRESENT, 0),
    (Pte.PRESENT, 2),
    (Pte.PRESENT, 3),
    (Pte.PRESENT | Pte.ZERO, 0),
    (Pte.PRESENT | Pte.SHARED, 0),
    (Pte.PRESENT | Pte.UNREFERENCED, 0),
    (Pte.PRESENT | Pte.LAZYFREE, 0),
    (Pte.PRESENT | Pte.UFFD_WP, 0),
    (Pte.SWAP, ORDER_NONE),
    (Pte.SWAP | Pte.GUARD, ORDER_NONE),
)
FLAGS = ("hg", "nh", "uw", "um", "dp", "io")


class Unknowing(FakeSpace):
    """A space that does not know which parts of it are empty."""

    populated = AddressSpace.populated


def filled(vma: Vma, geometry: Geometry = X86_64, state: int = Pte.PRESENT, order: int = 0) -> tuple[Vma, Any, Any]:
    """Return a mapping with all pages in one state."""
    return vma, *page_runs((vma.size // geometry.page_size, state, order))


def anon(first: int, count: int, geometry: Geometry = X86_64, **properties: Any) -> Vma:
    """Return a mapping of `count` whole PMD ranges, from the `first` one above BASE on."""
    start = BASE + first * geometry.pmd_size
    return Vma(start, start + count * geometry.pmd_size, "rw-p", **properties)


def planned(space: AddressSpace, **options: Any) -> SpacePlan:
    return plan_space(space, PlanOptions(**options))


def folios(plan: SpacePlan) -> list[tuple[int, int, int]]:
    """(address, order, filled) of each."""
    rows = plan.folios
    return list(zip(rows.address.tolist(), rows.order.tolist(), rows.filled.tolist(), strict=True))


def ranges(plan: SpacePlan) -> list[tuple[int, ...]]:
    rows = plan.ranges
    columns = (rows.address, rows.scan_result, rows.resident, rows.copied, rows.filled)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def same(one: SpacePlan, other: SpacePlan) -> bool:
    return folios(one) == folios(other) and ranges(one) == ranges(other)


def addresses(plan: SpacePlan) -> list[int]:
    found: list[int] = plan.ranges.address.tolist()
    return found


def whole_ranges(vma: Vma, geometry: Geometry) -> list[int]:
    """The PMD ranges that lie in `vma` as a whole, counted up plainly."""
    first = vma.start - vma.start % geometry.pmd_size
    starts = range(first, vma.end, geometry.pmd_size)
    return [start for start in starts if start >= vma.start and start + geometry.pmd_size <= vma.end]


def expected_rows(
    space: FakeSpace, vma: Vma, options: dict[str, Any]
) -> tuple[list[tuple[int, int, int]], list[tuple[int, ...]]]:
    """What plan_ranges says of one mapping: folios, and ranges that hold anything, both with addresses."""
    geometry = space.geometry
    starts = whole_ranges(vma, geometry)
    columns = space.read([(start, start + geometry.pmd_size) for start in starts])

    def plane(bit: Pte) -> NDArray[np.bool_]:
        return columns.has(bit).reshape(len(starts), geometry.ptes_per_pmd)

    plan = mthp.plan_ranges(
        plane(Pte.PRESENT),
        zero=plane(Pte.ZERO),
        swap=plane(Pte.SWAP),
        guard=plane(Pte.GUARD),
        shared=plane(Pte.SHARED),
        lazyfree=plane(Pte.LAZYFREE),
        uffd=plane(Pte.UFFD_WP),
        unreferenced=plane(Pte.UNREFERENCED),
        folio_order=np.maximum(columns.folio_order, 0).reshape(len(starts), -1),
        pmd_mapped=plane(Pte.PMD_MAPPED).all(axis=1),
        uffd_armed=bool({"um", "uw", "ui"} & vma.flags),
        droppable="dp" in vma.flags,
        geometry=geometry,
        **options,
    )
    found = plan.folios
    made = [
        (starts[index] + offset * geometry.page_size, order, fill)
        for index, offset, order, fill in zip(
            found.range.tolist(), found.offset.tolist(), found.order.tolist(), found.filled.tolist(), strict=True
        )
    ]
    columns_of_plan = (plan.scan_result, plan.resident, plan.copied, plan.filled)
    rows = zip(starts, *(column.tolist() for column in columns_of_plan), strict=True)
    state = columns.state.reshape(len(starts), -1)
    return made, [row for index, row in enumerate(rows) if state[index].any()]


@st.composite
def layouts(draw: st.DrawFn) -> FakeSpace:
    """Return a few mappings of a machine with small PMD ranges, aligned or not, close together or not."""
    geometry = draw(st.sampled_from([PPC, geometry_named("s390x")]))
    address = BASE + draw(st.integers(0, 40)) * geometry.page_size
    mappings = []
    for _ in range(draw(st.integers(1, 4))):
        runs = draw(st.lists(st.tuples(st.integers(1, geometry.ptes_per_pmd), st.sampled_from(PALETTE)), min_size=1))
        pages = [(count, *kind) for count, kind in runs]
        size = sum(count for count, _ in runs) * geometry.page_size
        flags = frozenset(draw(st.lists(st.sampled_from(FLAGS), max_size=1)))
        mappings.append((Vma(address, address + size, "rw-p", flags=flags), *page_runs(*pages)))
        address += size + draw(st.sampled_from([0, 0, geometry.page_size, 3 * geometry.pmd_size]))
    return FakeSpace(mappings, geometry=geometry)


@st.composite
def plan_choices(draw: st.DrawFn, geometry: Geometry) -> dict[str, Any]:
    limits = st.one_of(st.none(), st.sampled_from([0, 1, geometry.ptes_per_pmd - 1]), st.integers(0, 31))
    return {
        "policy": draw(st.sampled_from(POLICIES)),
        "trigger": draw(st.sampled_from(["khugepaged", "khugepaged", "madvise"])),
        "orders": draw(
            st.one_of(st.none(), st.lists(st.sampled_from(geometry.anon_orders), min_size=1).map(lambda o: [*o]))
        ),
        "max_ptes_none": draw(limits),
        "max_ptes_swap": draw(limits),
        "max_ptes_shared": draw(limits),
        "mthp_min_order": draw(st.sampled_from([None, 2, 3])),
    }


@settings(max_examples=examples(120))
@given(st.data())
def test_a_plan_is_that_of_each_mapping_alone(data: st.DataObject) -> None:
    space = data.draw(layouts())
    options = data.draw(plan_choices(space.geometry))
    plan = plan_space(space, PlanOptions(**options), portion_ranges=data.draw(st.sampled_from([1, 2, 3, 128])))
    made: list[tuple[int, int, int]] = []
    rows: list[tuple[int, ...]] = []
    refused = []
    for vma in space.vmas():
        if not whole_ranges(vma, space.geometry) or {"nh", "io"} & vma.flags:
            refused.append(vma)
            continue
        more_made, more_rows = expected_rows(space, vma, options)
        made += more_made
        rows += more_rows
    assert folios(plan) == made
    assert ranges(plan) == rows
    assert [vma for vma, _ in plan.refused] == refused
    assert plan.filled_bytes == sum(row[4] for row in rows) * space.geometry.page_size
    assert plan.copied_bytes == sum(row[3] for row in rows) * space.geometry.page_size
    assert 0 <= plan.coverage <= plan.coverage_after <= 1
    assert space.attempts == []


@settings(max_examples=examples(30))
@given(st.data())
def test_it_does_not_matter_what_a_backend_knows_to_be_empty(data: st.DataObject) -> None:
    space = data.draw(layouts())
    options = data.draw(plan_choices(space.geometry))
    knowing = planned(space, **options)
    space.__class__ = Unknowing
    assert same(planned(space, **options), knowing)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=lambda geometry: geometry.name)
@pytest.mark.parametrize("policy", POLICIES)
def test_full_memory_becomes_one_folio_a_range_on_every_machine(geometry: Geometry, policy: str) -> None:
    plan = planned(FakeSpace([filled(anon(0, 2, geometry), geometry)], geometry=geometry), policy=policy)
    pmd_order = geometry.pmd_order
    assert folios(plan) == [(BASE, pmd_order, 0), (BASE + geometry.pmd_size, pmd_order, 0)]
    assert plan.folios_by_order == {pmd_order: 2}
    assert plan.ranges_by_result == {ScanResult.SUCCEED: 2}
    assert (plan.coverage, plan.coverage_after) == (0.0, 1.0)
    assert (plan.copied_bytes, plan.filled_bytes) == (2 * geometry.pmd_size, 0)


@pytest.mark.parametrize(
    ("properties", "reason"),
    [
        ({"flags": frozenset({"nh"})}, "MADV_NOHUGEPAGE is set"),
        ({"flags": frozenset({"io"})}, "device memory (VM_IO)"),
        ({"kind": VmaKind.HUGETLB}, "hugetlbfs pages"),
        ({"kind": VmaKind.SPECIAL}, "made by the kernel or a driver"),
        ({"kind": VmaKind.FILE}, "memory of a file, not anonymous"),
        ({"kind": VmaKind.SHMEM}, "shared memory, not anonymous"),
        ({"has_anon_vma": False}, "it was never written"),
    ],
)
def test_what_must_not_be_collapsed_is_not_planned(properties: dict[str, Any], reason: str) -> None:
    kept = anon(0, 1)
    spared = anon(4, 2, **properties)
    plan = planned(FakeSpace([filled(kept), filled(spared)]))
    assert addresses(plan) == [kept.start]
    assert plan.refused == ((spared, reason),)
    assert [(left.reason, left.mappings, left.size) for left in plan.left] == [(reason, 1, spared.size)]


def test_a_process_that_switched_thp_off_is_left_alone() -> None:
    plan = planned(FakeSpace([filled(anon(0, 2))], thp_disabled=True))
    assert len(plan.ranges) == len(plan.folios) == plan.planned_bytes == 0
    assert plan.orders == ()
    assert "PR_SET_THP_DISABLE" in plan.refused[0][1]


def test_reasons_are_summed_up_the_most_memory_first() -> None:
    mappings = [anon(0, 1, kind=VmaKind.FILE), anon(3, 1, kind=VmaKind.FILE), anon(6, 5, flags=frozenset({"nh"}))]
    plan = planned(FakeSpace([filled(vma) for vma in mappings]))
    assert [(left.reason, left.mappings, left.size) for left in plan.left] == [
        ("MADV_NOHUGEPAGE is set", 1, 5 * X86_64.pmd_size),
        ("memory of a file, not anonymous", 2, 2 * X86_64.pmd_size),
    ]


def test_what_is_huge_stays() -> None:
    huge = filled(anon(0, 1), state=Pte.PRESENT | Pte.PMD_MAPPED, order=9)
    plan = planned(FakeSpace([huge, filled(anon(1, 1))]))
    assert folios(plan) == [(BASE + X86_64.pmd_size, 9, 0)]
    assert plan.ranges_by_result == {ScanResult.SUCCEED: 1, ScanResult.PMD_MAPPED: 1}
    assert (plan.coverage, plan.coverage_after) == (0.5, 1.0)


def test_the_huge_zero_page_is_no_memory() -> None:
    zero = filled(anon(0, 3), state=Pte.PRESENT | Pte.ZERO | Pte.PMD_MAPPED, order=9)
    plan = planned(FakeSpace([zero, filled(anon(3, 1))]), policy="pmd-only", max_ptes_none=0)
    assert plan.ranges_by_result[ScanResult.PMD_MAPPED] == 3
    assert (plan.coverage, plan.coverage_after) == (0.0, 1.0)
    assert planned(FakeSpace([zero])).coverage == 0.0


def test_swapped_pages_that_come_back_count_afterwards() -> None:
    columns = page_runs((480, Pte.PRESENT, 0), (32, Pte.SWAP, ORDER_NONE))
    plan = planned(FakeSpace([(anon(0, 1), *columns)]), policy="pmd-only")
    assert plan.folios_by_order == {9: 1}
    assert (plan.coverage, plan.coverage_after) == (0.0, 1.0)


def test_coverage_counts_what_smaller_folios_fill() -> None:
    huge = filled(anon(0, 1), state=Pte.PRESENT | Pte.PMD_MAPPED, order=9)
    columns = page_runs((8, Pte.PRESENT, 0), (504, 0, ORDER_NONE))
    plan = planned(FakeSpace([huge, (anon(1, 1), *columns)]), orders="64K", max_ptes_none=511)
    assert folios(plan) == [(BASE + X86_64.pmd_size, 4, 8)]
    # Coverage is that of the sizes asked for; that of the PMD size is smaller afterwards.
    assert (plan.coverage, plan.coverage_after) == (512 / 520, 1.0)
    assert (plan.before.share(9), plan.after.share(9)) == (512 / 520, 512 / 528)


SWITCHES = Switches("madvise", {2: "never", 4: "inherit", 6: "always", 9: "madvise"})


def test_orders_enabled_follow_the_switches_of_each_mapping() -> None:
    advised, plain = anon(0, 1, flags=frozenset({"hg"})), anon(1, 1)
    # 64 full pages in front: an order 6 run, four runs of order 4.
    columns = page_runs((64, Pte.PRESENT, 0), (448, 0, ORDER_NONE))
    space = FakeSpace([(advised, *columns), (plain, *columns)], switches=SWITCHES)
    plan = planned(space, orders="enabled", max_ptes_none=511)
    assert plan.orders == (4, 6, 9)
    assert folios(plan) == [(advised.start, 9, 448), (plain.start, 6, 0)]


def test_orders_enabled_leaves_alone_what_no_switch_allows() -> None:
    advised, plain = anon(0, 1, flags=frozenset({"hg"})), anon(1, 1)
    space = FakeSpace([filled(advised), filled(plain)], switches=Switches("madvise", {9: "inherit"}))
    plan = planned(space, orders="enabled")
    assert addresses(plan) == [advised.start]
    assert plan.refused == ((plain, "no size is enabled for memory without MADV_HUGEPAGE (enabled is 'madvise')"),)
    nothing = planned(FakeSpace([filled(advised)], switches=Switches("never", {9: "inherit"})), orders="enabled")
    assert (nothing.orders, len(nothing.ranges)) == ((), 0)


def test_orders_that_are_given_do_not_ask_the_switches() -> None:
    space = FakeSpace([filled(anon(0, 1))], switches=Switches("never", {9: "never"}))
    assert planned(space, orders="64K").folios_by_order == {4: 32}
    assert planned(space, orders=(4,)).folios_by_order == {4: 32}
    assert planned(space).folios_by_order == {9: 1}


def test_files_are_planned_at_the_pmd_order_when_wanted() -> None:
    mappings = [anon(0, 1), anon(2, 1, kind=VmaKind.FILE), anon(4, 1, kind=VmaKind.SHMEM)]
    space = FakeSpace([filled(vma, state=Pte.PRESENT | Pte.FILE) for vma in mappings])
    plan = planned(space, include_file=True, orders="16K")
    assert {order for _, order, _ in folios(plan) if order != 2} == {9}
    assert [address for address, order, _ in folios(plan) if order == 9] == [vma.start for vma in mappings[1:]]
    assert plan.orders == (2, 9)


def test_limits_do_not_hold_for_files() -> None:
    columns = page_runs((1, Pte.PRESENT | Pte.FILE | Pte.SHARED, 0), (511, 0, ORDER_NONE))
    space = FakeSpace([(anon(0, 1, kind=VmaKind.SHMEM), *columns)])
    assert planned(space, include_file=True, max_ptes_none=0, max_ptes_shared=0).folios_by_order == {9: 1}


@pytest.mark.parametrize(
    ("within", "first", "count"),
    [
        ((BASE, BASE + 4 * X86_64.pmd_size), 0, 4),
        ((BASE + X86_64.pmd_size, BASE + 2 * X86_64.pmd_size), 1, 1),
        ((BASE + 1, BASE + 3 * X86_64.pmd_size - 1), 1, 1),
        ((BASE + X86_64.pmd_size + 1, BASE + 2 * X86_64.pmd_size + 4096), 0, 0),
        ((BASE + 3 * X86_64.pmd_size, BASE + X86_64.pmd_size), 0, 0),
        ((0, BASE), 0, 0),
        ((0, 1 << 47), 0, 4),
    ],
)
def test_within_plans_the_whole_ranges_in_it(within: Segment, first: int, count: int) -> None:
    plan = planned(FakeSpace([filled(anon(0, 4))]), within=within)
    assert addresses(plan) == [BASE + i * X86_64.pmd_size for i in range(first, first + count)]
    assert plan.planned_bytes == count * X86_64.pmd_size


def test_within_leaves_out_the_reasons_of_what_lies_elsewhere() -> None:
    near, far = anon(1, 1, flags=frozenset({"nh"})), anon(9, 1, flags=frozenset({"nh"}))
    space = FakeSpace([filled(anon(0, 1)), filled(near), filled(far)])
    plan = planned(space, within=(BASE, BASE + X86_64.pmd_size + X86_64.page_size))
    assert [vma for vma, _ in plan.refused] == [near]
    assert [vma for vma, _ in planned(space).refused] == [near, far]


def test_limits_are_the_targets_own_unless_given() -> None:
    columns = page_runs((500, Pte.PRESENT, 0), (12, 0, ORDER_NONE))
    own = dataclasses.replace(Tunables.defaults(X86_64), max_ptes_none=11)
    space = FakeSpace([(anon(0, 1), *columns)], tunables=own)
    assert planned(space, policy="pmd-only").folios_by_order == {}
    assert planned(space, policy="pmd-only", max_ptes_none=12).folios_by_order == {9: 1}
    assert planned(space).tunables == own


def test_the_machine_is_asked_once_not_for_every_mapping() -> None:
    asked: list[str] = []

    class Asked(FakeSpace):
        @property
        def switches(self) -> Switches:
            asked.append("switches")
            return super().switches

        @property
        def thp_disabled(self) -> bool:
            asked.append("thp_disabled")
            return super().thp_disabled

    planned(Asked([filled(anon(2 * index, 1)) for index in range(20)]), orders="enabled")
    assert sorted(asked) == ["switches", "thp_disabled"]


def test_reads_stay_small_and_progress_ends_at_the_sum() -> None:
    read: list[int] = []
    told: list[tuple[int, int]] = []

    class Measured(FakeSpace):
        def read(self, segments: Any) -> Any:
            read.append(sum(end - start for start, end in segments))
            return super().read(segments)

    space = Measured([filled(anon(0, 5, PPC), PPC), filled(anon(9, 4, PPC), PPC)], geometry=PPC)
    plan_space(space, PlanOptions(), lambda done, total: told.append((done, total)), portion_ranges=2)
    assert max(read) == 2 * PPC.pmd_size
    # The planned state is measured at the same time.
    assert sum(read) == 9 * PPC.pmd_size
    assert told == sorted(told)
    assert told[-1] == (9 * PPC.pmd_size, 9 * PPC.pmd_size)


def test_a_target_that_vanishes() -> None:
    space = FakeSpace([filled(anon(0, 1))])
    space.vanished = True
    with pytest.raises(TargetVanishedError):
        planned(space)


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_of_files_becomes_pmd_folios_under_every_policy(policy: str) -> None:
    """Another function of the kernel collapses it, which knows no bitmap and no smaller order."""
    half = page_runs((256, Pte.PRESENT, 0), (256, 0, ORDER_NONE))
    space = FakeSpace([(anon(0, 1, kind=VmaKind.FILE, offset=0), *half)])
    assert planned(space, include_file=True, policy=policy, max_ptes_none=0).folios_by_order == {9: 1}


def test_a_size_that_is_always_needs_no_bits_of_the_seeds_second_version() -> None:
    """Order 4 is tried without, order 5 is not; the limit of isolation holds for both."""
    switches = Switches("never", {4: "always", 5: "madvise", 9: "madvise"})
    columns = page_runs((15, Pte.PRESENT, 0), (497, 0, ORDER_NONE))
    space = FakeSpace([(anon(0, 1, flags=frozenset({"hg"})), *columns)], switches=switches)
    options: dict[str, Any] = {"policy": "rfc2", "max_ptes_none": 63}
    assert planned(space, orders="enabled", **options).folios_by_order == {4: 1}
    assert planned(space, orders="64K,128K,2M", **options).folios_by_order == {}


@given(st.lists(st.integers(0, 60), max_size=20, unique=True), st.lists(st.integers(0, 60), max_size=20, unique=True))
def test_what_is_without_some_segments(first: list[int], second: list[int]) -> None:
    segments, removed = (
        [(start, end) for start, end in zip(sorted(points)[::2], sorted(points)[1::2], strict=False)]
        for points in (first, second)
    )
    covered = {page for start, end in segments for page in range(start, end)}
    covered -= {page for start, end in removed for page in range(start, end)}
    left = list(without(segments, removed))
    assert [page for start, end in left for page in range(start, end)] == sorted(covered)
