"""The census: every page is counted once, under its order and its states, for its mapping."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import FakeSpace, page_runs
from mthp.engine.census import STATES, PageCounts, runs_of_equal, take_census
from mthp.errors import TargetVanishedError, UnsupportedError
from mthp.geometry import X86_64, Geometry, geometry_named
from mthp.metrics import ALIGNED, MAX_FOLIO_ORDER, PARTIAL
from mthp.ptes import ORDER_NONE, ORDER_UNKNOWN, Pte, PteColumns
from mthp.sim import Machine
from mthp.sim.mm import HUGEPAGE
from mthp.tunables import Switches
from mthp.vma import Vma, VmaKind
from strategies import examples

PAGE = 4096
PMD = 2 << 20
HEAP = 0x7F00_0000_0000

Run = tuple[int, int, int]
"""Pages, bits of Pte, folio order: as page_runs takes them."""

RUNS: tuple[tuple[int, int], ...] = (
    (0, ORDER_NONE),
    (Pte.PRESENT, 0),
    (Pte.PRESENT, 4),
    (Pte.PRESENT, ORDER_UNKNOWN),
    (Pte.PRESENT | Pte.PMD_MAPPED, 9),
    (Pte.PRESENT | Pte.ZERO, 0),
    (Pte.PRESENT | Pte.ZERO | Pte.PMD_MAPPED, 9),
    (Pte.PRESENT | Pte.SHARED | Pte.FILE, 2),
    (Pte.PRESENT | Pte.LAZYFREE, 0),
    (Pte.PRESENT | Pte.UFFD_WP, 0),
    (Pte.PRESENT | Pte.HUGETLB | Pte.PMD_MAPPED, 18),
    (Pte.SWAP, ORDER_NONE),
    (Pte.SWAP | Pte.GUARD, ORDER_NONE),
    (Pte.SWAP | Pte.UFFD_WP, ORDER_NONE),
)
"""Possible states of a page, with the order of its folio."""


def mapping(start: int, *runs: Run, page_size: int = PAGE, **properties: Any) -> tuple[Vma, Any, Any]:
    pages = sum(run[0] for run in runs)
    vma = Vma(start, start + pages * page_size, properties.pop("permissions", "rw-p"), **properties)
    return vma, *page_runs(*runs)


@dataclass
class Plain:
    """Count by a loop over single pages."""

    orders: Counter[int]
    states: Counter[str]
    unknown: int = 0

    @classmethod
    def of(cls, runs: list[Run]) -> Plain:
        plain = cls(Counter(), Counter())
        for pages, state, order in runs:
            for _ in range(pages):
                plain.states.update(name for name, bit in STATES.items() if state & bit)
                if state & Pte.PRESENT and not state & Pte.ZERO:
                    if order == ORDER_UNKNOWN:
                        plain.unknown += 1
                    else:
                        plain.orders[order] += 1
        return plain

    def equals(self, counts: PageCounts) -> bool:
        return (
            counts.by_order() == dict(self.orders)
            and counts.unknown == self.unknown
            and counts.resident == self.orders.total() + self.unknown
            and all(counts.state(name) == self.states[name] for name in STATES)
        )


run_lists = st.lists(
    st.builds(lambda pages, kind: (pages, *kind), st.integers(1, 40), st.sampled_from(RUNS)), min_size=1, max_size=6
)


@settings(max_examples=examples(150))
@given(st.lists(st.tuples(run_lists, st.integers(0, 2)), max_size=5), st.integers(1, 70))
def test_counts_are_those_of_a_loop_over_pages(layout: list[tuple[list[Run], int]], portion_pages: int) -> None:
    mappings, address = [], HEAP
    for runs, gap in layout:
        address += gap * PAGE
        mappings.append(mapping(address, *runs))
        address = mappings[-1][0].end
    counted = take_census(FakeSpace(mappings), portion_pages=portion_pages)
    assert [vma.vma for vma in counted.vmas] == [vma for vma, _, _ in mappings]
    for vma, (runs, _) in zip(counted.vmas, layout, strict=True):
        assert Plain.of(runs).equals(vma.pages), vma
    assert Plain.of([run for runs, _ in layout for run in runs]).equals(counted.total)


@pytest.mark.parametrize("portion_pages", [1, 3, 512, 513, 1 << 16])
def test_where_portions_end_does_not_matter(portion_pages: int) -> None:
    runs: tuple[Run, ...] = ((5, Pte.PRESENT, 0), (512, Pte.PRESENT | Pte.PMD_MAPPED, 9), (7, Pte.SWAP, ORDER_NONE))
    # Neighbours, of which one ends as the other begins.
    first, second = mapping(HEAP, *runs), mapping(HEAP + 524 * PAGE, *reversed(runs))
    counted = take_census(FakeSpace([first, second]), portion_pages=portion_pages)
    for vma in counted.vmas:
        assert vma.pages.by_order() == {0: 5, 9: 512}
        assert vma.pages.state("swap") == 7
        assert vma.pages.state("pmd_mapped") == 512


def test_page_counts_by_order_and_by_share() -> None:
    heap = mapping(
        HEAP, (100, Pte.PRESENT, 0), (60, Pte.PRESENT, ORDER_UNKNOWN), (16, Pte.PRESENT, 4), (24, Pte.PRESENT, 9)
    )
    pages = take_census(FakeSpace([heap])).vmas[0].pages
    assert pages.resident == 200
    assert pages.by_order() == {0: 100, 4: 16, 9: 24}
    # PTEs map a part of the folio of order 9: the aligned blocks of order 4 and 3 in it count as such.
    assert pages.coverage.share(9) == pages.coverage.share(5) == 0
    assert pages.coverage.share(4) == 32 / 200
    assert pages.coverage.share(1) == 40 / 200
    assert (pages.mapped_as(ALIGNED, 4), pages.mapped_as(PARTIAL, 9)) == (16, 24)


def test_zero_swapped_and_empty_pages_are_not_resident() -> None:
    heap = mapping(HEAP, (3, Pte.PRESENT | Pte.ZERO, 0), (4, Pte.SWAP, ORDER_NONE), (5, 0, ORDER_NONE))
    pages = take_census(FakeSpace([heap])).vmas[0].pages
    assert pages.resident == 0
    assert pages.by_order() == {}
    assert pages.coverage.share(9) == 0.0
    assert (pages.state("zero"), pages.state("swap")) == (3, 4)


def test_larger_folios_than_counted_count_as_the_largest() -> None:
    heap = mapping(HEAP, (8, Pte.PRESENT, 40))
    assert take_census(FakeSpace([heap])).total.by_order() == {MAX_FOLIO_ORDER: 8}


def test_an_empty_process() -> None:
    counted = take_census(FakeSpace([]))
    assert counted.vmas == ()
    assert counted.total.resident == counted.anonymous.resident == 0


def every_kind() -> FakeSpace:
    """A mapping of every kind and of every fate, 4 MiB each but for the small one, with a page written in each."""
    kinds: list[dict[str, Any]] = [
        {"kind": VmaKind.ANON},
        {"kind": VmaKind.ANON, "flags": frozenset({"hg"})},
        {"kind": VmaKind.ANON, "flags": frozenset({"nh"})},
        {"kind": VmaKind.ANON, "has_anon_vma": False},
        {"kind": VmaKind.FILE, "name": "/lib/libc.so"},
        {"kind": VmaKind.SHMEM, "name": "/memfd:x"},
        {"kind": VmaKind.HUGETLB},
        {"kind": VmaKind.SPECIAL, "name": "[vvar]"},
    ]
    mappings = [
        mapping(HEAP + 3 * index * PMD, (1, Pte.PRESENT, 0), (1023, 0, ORDER_NONE), **kind)
        for index, kind in enumerate(kinds)
    ]
    small = mapping(HEAP + 60 * PMD, (1, Pte.PRESENT, 0), (9, 0, ORDER_NONE))
    return FakeSpace([*mappings, small], switches=Switches("madvise", {4: "inherit", 9: "always"}))


def test_every_mapping_says_what_it_may_become_and_why_not_more() -> None:
    found = take_census(every_kind()).vmas
    assert [vma.khugepaged.orders for vma in found] == [(9,), (4, 9), *[()] * 7]
    every = X86_64.anon_orders
    assert [vma.madvise.orders for vma in found] == [every, every, (), (), (9,), (9,), (), (), ()]
    for vma, words in zip(
        found[2:],
        ["MADV_NOHUGEPAGE", "written", "file", "shared memory", "hugetlb", "driver", "smaller than 2M"],
        strict=True,
    ):
        assert words in vma.khugepaged.reason
        assert words in vma.madvise.reason


def test_total_is_everything_but_drivers_and_anonymous_is_less() -> None:
    counted = take_census(every_kind())
    assert counted.total.resident == 8
    # One page of the file's mapping was written, so that it is a copy without a file.
    assert counted.anonymous.resident == 6
    special = next(vma for vma in counted.vmas if vma.vma.kind is VmaKind.SPECIAL)
    assert special.pages.resident == 0


def test_a_process_that_switched_thp_off_may_become_nothing() -> None:
    space = FakeSpace([mapping(HEAP, (1024, Pte.PRESENT, 0))], thp_disabled=True, missing=("all: look harder",))
    counted = take_census(space)
    assert counted.thp_disabled
    assert counted.missing == ("all: look harder",)
    assert not counted.vmas[0].khugepaged
    assert "PR_SET_THP_DISABLE" in counted.vmas[0].madvise.reason


@pytest.mark.parametrize("geometry", [geometry_named(name) for name in ("s390x", "arm64-16k", "ppc64-64k")])
def test_other_geometries(geometry: Geometry) -> None:
    n = geometry.ptes_per_pmd
    huge: Run = (n, Pte.PRESENT | Pte.PMD_MAPPED, geometry.pmd_order)
    space = FakeSpace([mapping(HEAP, huge, (3, Pte.PRESENT, 0), page_size=geometry.page_size)], geometry=geometry)
    counted = take_census(space, portion_pages=n - 1)
    assert counted.total.by_order() == {0: 3, geometry.pmd_order: n}
    assert counted.total.coverage.share(geometry.pmd_order) == n / (n + 3)
    assert counted.vmas[0].madvise.orders == geometry.anon_orders


def test_progress_ends_at_the_sum() -> None:
    told: list[tuple[int, int]] = []
    space = FakeSpace([mapping(HEAP, (100, Pte.PRESENT, 0)), mapping(HEAP + PMD, (60, Pte.PRESENT, 0))])
    take_census(space, lambda done, total: told.append((done, total)), portion_pages=64)
    assert told == sorted(told)
    assert len(told) >= 2
    assert told[-1] == (160 * PAGE, 160 * PAGE)


def test_a_target_that_vanishes() -> None:
    class Dying(FakeSpace):
        def read(self, segments: Any) -> PteColumns:
            self.vanished = True
            return super().read(segments)

    with pytest.raises(TargetVanishedError):
        take_census(Dying([mapping(HEAP, (100, Pte.PRESENT, 0))]))


def test_runs_of_equal_end_with_their_segment() -> None:
    state, order = page_runs((4, Pte.PRESENT, 0), (3, Pte.PRESENT, 2), (3, Pte.SWAP, ORDER_NONE))
    segments = ((HEAP, HEAP + 2 * PAGE), (HEAP + 9 * PAGE, HEAP + 17 * PAGE))
    first, pages = runs_of_equal(PteColumns(segments, state, order), PAGE)
    assert first.tolist() == [0, 2, 4, 7]
    assert pages.tolist() == [2, 2, 3, 3]
    assert pages.dtype == np.int64


def test_pages_of_zeroes_in_a_simulated_machine() -> None:
    machine = Machine(switches=Switches("madvise", {9: "inherit"}))
    mm = machine.create_mm()
    machine.map(mm, HEAP, HEAP + 2 * PMD, flags={HUGEPAGE})
    machine.write(mm, HEAP + 5 * PAGE, 77)
    machine.read(mm, HEAP + PMD)
    counted = take_census(machine.space(mm), zero_filled=True).anonymous
    assert counted.zero_filled is not None
    # The zero page holds nothing that could be got back.
    assert {order: int(pages) for order, pages in enumerate(counted.zero_filled) if pages} == {9: 511}
    assert take_census(machine.space(mm)).anonymous.zero_filled is None


def test_an_address_space_without_contents_says_so() -> None:
    with pytest.raises(UnsupportedError, match="has no contents"):
        take_census(FakeSpace([mapping(HEAP, (1, Pte.PRESENT, 0))]), zero_filled=True)
