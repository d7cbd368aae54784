"""Coverage: what counts for a size, and how folios are mapped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fakes import FakeSpace, page_runs
from mthp.geometry import X86_64
from mthp.measuring import Scope, measure
from mthp.metrics import (
    ALIGNED,
    ALIGNMENTS,
    ORDERS,
    PARTIAL,
    PMD,
    UNALIGNED,
    CoverageCounter,
    anonymous_pages,
    mapped_runs,
    page_numbers,
)
from mthp.ptes import ORDER_NONE, ORDER_UNKNOWN, Pte, PteColumns
from mthp.vma import Vma, VmaKind

PAGE = X86_64.page_size
HEAP = 0x7F00_0000_0000
HEAP_PAGE = HEAP // PAGE
N = X86_64.ptes_per_pmd
HUGE = Pte.PRESENT | Pte.PMD_MAPPED

Piece = tuple[int, int, int, int]
"""Pages before it, the order of a folio, its first mapped page, and the number of mapped pages."""


def columns_of(pieces: list[Piece], shift: int = 0) -> PteColumns:
    """Folios one after another, each at frames of its own that are aligned to its size."""
    state: list[int] = []
    order: list[int] = []
    frames: list[int] = []
    head = 1 << 20
    for gap, size, first, count in pieces:
        first = min(first, (1 << size) - 1)
        count = min(count, (1 << size) - first)
        state += [0] * gap + [int(Pte.PRESENT)] * count
        order += [ORDER_NONE] * gap + [size] * count
        frames += [0] * gap + list(range(head + first, head + first + count))
        head += 2 * N
    start = HEAP + shift * PAGE
    segment = (start, start + len(state) * PAGE)
    return PteColumns((segment,), np.array(state, np.uint16), np.array(order, np.int8), np.array(frames, np.uint64))


def plainly_usable(columns: PteColumns, order: int) -> int:
    """Pages in usable blocks of `order`, counted block by block."""
    assert columns.pfn is not None
    start = columns.segments[0][0] // PAGE
    found, size = 0, 1 << order
    pages: NDArray[np.int64] = start + np.arange(len(columns.state))
    for block in np.unique(pages >> order):
        at = np.flatnonzero(pages >> order == block)
        frames = columns.pfn[at].astype(np.int64)
        in_one = (
            len(at) == size and (columns.state[at] & Pte.PRESENT).all() and (columns.folio_order[at] >= order).all()
        )
        if in_one and frames[0] % size == 0 and (np.diff(frames) == 1).all():
            found += size
    return found


@given(
    pieces=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(0, 63), st.integers(1, 64)), min_size=1, max_size=8
    ),
    shift=st.integers(0, 70),
)
def test_usable_pages_are_those_of_a_loop_over_blocks(pieces: list[Piece], shift: int) -> None:
    columns = columns_of(pieces, shift)
    counter = CoverageCounter([(HEAP, HEAP + (1 << 30))], X86_64)
    counter.add(columns, anonymous_pages(columns))
    counted = counter.coverage(0, 1)
    assert counted.resident == int((columns.state != 0).sum())
    for order in range(1, 7):
        assert counted.pages[order] == plainly_usable(columns, order), order


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 4), st.lists(st.booleans(), min_size=4, max_size=4))))
def test_every_page_of_several_segments_counts_where_it_is(parts: list[tuple[int, int, list[bool]]]) -> None:
    segments, resident = [], []
    numbers: list[int] = []
    at = HEAP_PAGE
    for gap, pages, bits in parts:
        at += gap
        segments.append((at * PAGE, (at + pages) * PAGE))
        numbers += range(at, at + pages)
        resident.append(bits[:pages])
        at += pages
    chosen = np.array([bit for bits in resident for bit in bits], np.bool_)
    columns = PteColumns(
        tuple(segments), chosen * np.uint16(Pte.PRESENT), np.where(chosen, np.int8(0), np.int8(ORDER_NONE))
    )
    index = np.flatnonzero(chosen)
    assert page_numbers(columns, PAGE).tolist() == numbers
    assert page_numbers(columns, PAGE, index).tolist() == np.array(numbers, np.int64)[index].tolist()
    counter = CoverageCounter(segments, X86_64)
    counter.add(columns, chosen)
    assert [counter.coverage(vma, vma + 1).resident for vma in range(len(parts))] == [sum(bits) for bits in resident]


def test_a_folio_is_mapped_aligned_unaligned_or_partly() -> None:
    # The heap begins at a multiple of every size.
    columns = columns_of([(0, 4, 0, 16), (8, 4, 0, 16), (24, 4, 3, 13)])
    runs = mapped_runs(columns, PAGE, anonymous_pages(columns))
    assert runs.count.tolist() == [16, 16, 13]
    assert runs.alignment().tolist() == [ALIGNED, UNALIGNED, PARTIAL]
    assert ALIGNMENTS[PMD] == "pmd_mapped"


def test_two_folios_side_by_side_are_two_runs_even_at_neighbouring_frames() -> None:
    frames = np.arange(32, 64, dtype=np.uint64)
    segment = (HEAP, HEAP + 32 * PAGE)
    columns = PteColumns((segment,), np.ones(32, np.uint16), np.full(32, 4, np.int8), frames)
    assert mapped_runs(columns, PAGE, anonymous_pages(columns)).count.tolist() == [16, 16]


@pytest.mark.parametrize(
    ("pages", "frames", "pmd_mapped"),
    [
        # The end of a folio before the middle of another, as if both were one.
        ([*range(8), *range(8, 16)], [*range(40, 48), *range(200, 208)], ()),
        # The ends of a folio around a hole.
        ([*range(8), *range(12, 20)], [*range(33, 41), *range(45, 53)], ()),
        # A part that a PMD entry maps before one that PTEs map.
        ([*range(16)], [*range(33, 49)], range(8)),
    ],
    ids=["frames apart", "a hole", "mapped otherwise"],
)
def test_parts_of_folios_that_do_not_belong_together_are_two_runs(
    pages: list[int], frames: list[int], pmd_mapped: Sequence[int]
) -> None:
    size = pages[-1] + 1
    state, pfn = np.zeros(size, np.uint16), np.zeros(size, np.uint64)
    state[pages], pfn[pages] = np.uint16(Pte.PRESENT), frames
    state[list(pmd_mapped)] |= np.uint16(Pte.PMD_MAPPED)
    order = np.where(state != 0, np.int8(5), np.int8(ORDER_NONE))
    columns = PteColumns(((HEAP, HEAP + size * PAGE),), state, order, pfn)
    assert mapped_runs(columns, PAGE, anonymous_pages(columns)).count.tolist() == [8, 8]


def test_a_huge_folio_off_its_alignment_is_not_huge() -> None:
    moved = columns_of([(0, 9, 0, N)], shift=16)
    counter = CoverageCounter([(HEAP, HEAP + (1 << 30))], X86_64)
    counter.add(moved, anonymous_pages(moved))
    coverage = counter.coverage(0, 1)
    assert coverage.share(9) == 0.0
    assert coverage.share(5) < 1.0
    assert coverage.share(4) == 1.0
    assert counter.alignments(0, 1)[UNALIGNED, 9] == N


def test_a_huge_folio_that_ptes_map_is_not_huge_either() -> None:
    split = columns_of([(0, 9, 0, N)])
    counter = CoverageCounter([(HEAP, HEAP + (1 << 30))], X86_64)
    counter.add(split, anonymous_pages(split))
    assert (counter.coverage(0, 1).share(9), counter.coverage(0, 1).share(8)) == (0.0, 1.0)


def vma(start: int, pages: int, **properties: object) -> Vma:
    return Vma(start, start + pages * PAGE, "rw-p", **properties)  # type: ignore[arg-type]


def test_anonymous_memory_is_measured_wherever_it_is_mapped() -> None:
    copied = vma(HEAP - 64 * PAGE, 8, kind=VmaKind.FILE, has_anon_vma=True)
    unwritten = vma(HEAP - 32 * PAGE, 8, kind=VmaKind.FILE)
    shared = vma(HEAP - 16 * PAGE, 8, kind=VmaKind.SHMEM)
    heap = vma(HEAP, N + 8)
    space = FakeSpace(
        [
            (copied, *page_runs((3, Pte.PRESENT, 0), (5, Pte.PRESENT | Pte.FILE, 0))),
            (unwritten, *page_runs((8, Pte.PRESENT | Pte.FILE, 0))),
            (shared, *page_runs((8, Pte.PRESENT | Pte.FILE, 0))),
            (heap, *page_runs((N, HUGE, 9), (4, Pte.PRESENT, ORDER_UNKNOWN), (4, Pte.SWAP, ORDER_NONE))),
        ]
    )
    measured = measure(space, space.vmas())
    assert measured.now.resident == 3 + N + 4
    assert measured.now.unknown == 4
    assert measured.now.share(9) == N / (3 + N + 4)
    assert [one.resident for one in measured.by_vma] == [3, 0, 0, N + 4]
    assert measure(space, space.vmas(), Scope(files=True)).now.resident == 3 + 5 + 8 + 8 + N + 4
    assert measure(space, space.vmas(), Scope(within=(HEAP, HEAP + N * PAGE))).now.share(9) == 1.0


@given(
    runs=st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0, 1, 2])), min_size=1, max_size=12),
    folios=st.lists(st.tuples(st.integers(0, 31), st.integers(2, 4)), max_size=6),
)
def test_what_is_planned_is_what_is_measured_once_it_is_made(
    runs: list[tuple[int, int]], folios: list[tuple[int, int]]
) -> None:
    kinds = {0: (0, ORDER_NONE), 1: (int(Pte.PRESENT), 0), 2: (int(Pte.SWAP), ORDER_NONE)}
    filled = [(count, *kinds[kind]) for count, kind in runs]
    rest = N - sum(count for count, _, _ in filled)
    state, order = page_runs(*filled, (max(rest, 0), Pte.PRESENT, 0))
    heap = vma(HEAP, N)
    space = FakeSpace([(heap, state[:N], order[:N])])
    # Disjoint, each at a multiple of its size.
    made = dict.fromkeys((HEAP + at * 16 * PAGE for at, _ in folios), 0)
    made |= {HEAP + at * 16 * PAGE: size for at, size in folios}
    addresses = sorted(made)
    planned = measure(
        space,
        space.vmas(),
        addresses=np.array(addresses, np.uint64),
        orders=np.array([made[address] for address in addresses], np.int8),
    ).planned
    for address, size in made.items():
        space.write(address, int(Pte.PRESENT), size, 1 << size)
    assert planned == measure(space, space.vmas()).now
    assert len(planned.pages) == ORDERS
