"""A machine's memory, which a plan and compaction change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from drawn_memory import compacted, free, freed, memory_of, packing, steps, trimmed
from mthp.engine.packing import Packing, Shape
from mthp.engine.reach import Limit, Steps, Supply, reachable
from mthp.freememory import FREE, MOVES, STAYS, TAIL, FreeMemory, FreeZone


def test_compaction_makes_blocks_of_what_is_free_where_memory_moves() -> None:
    work, memory = steps(3, 5), free(90, kept=-90)
    # Nothing is moved to the next block.
    assert compacted(work, memory, packing(memory, *["MMMMFFFF"] * 2)) == (0, {Limit.FOLIOS})
    assert compacted(work, memory, packing(memory, *["MMMMFFFF"] * 3)) == (1, {Limit.FOLIOS})
    assert compacted(work, memory, packing(memory, *["MMMMMMFF"] * 5)) == (1, {Limit.FOLIOS})
    assert compacted(work, memory, packing(memory, *["MMMMMMFF"] * 4)) == (0, {Limit.FOLIOS})
    # The pages that folios free become free folios again, wherever compaction moved them.
    own = [range(8 * block, 8 * block + 8) for block in range(1, 6)]
    moved = packing(memory, "MMMMFFFF", *["M" * 8] * 5, "MMMMFFFF", own=own)
    assert compacted(work, memory, moved) == (5, {Limit.NOTHING})
    short = free(15)
    assert compacted(work, short, packing(short, *["MMMMFFFF"] * 4)) == (1, {Limit.FOLIOS})


def test_a_page_that_stays_keeps_its_block_from_becoming_a_folio() -> None:
    work, memory = steps(3, 5), free(90, kept=-90)
    # The scanners meet after two blocks, in which a page stays.
    assert compacted(work, memory, packing(memory, *["SMMMFFFF"] * 5)) == (0, {Limit.FOLIOS})
    # Free pages beside it are of use above the block that is emptied, and lost below.
    assert compacted(work, memory, packing(memory, *["MMMMFFFF"] * 2, *["SMMMFFFF"] * 3)) == (2, {Limit.FOLIOS})
    assert compacted(work, memory, packing(memory, *["SMMMFFFF"] * 2, *["MMMMFFFF"] * 3)) == (0, {Limit.FOLIOS})


def test_pages_are_moved_to_blocks_of_the_type_movable_alone() -> None:
    work, memory = steps(3, 5), free(90, kept=-90)
    assert compacted(work, memory, packing(memory, *["MMMMFFFF"] * 3, *["SSSSFFFF"] * 2)) == (2, {Limit.FOLIOS})
    assert compacted(work, memory, packing(memory, *["MMMMFFFF"] * 3, *["ssssffff"] * 2)) == (1, {Limit.FOLIOS})


def test_after_blocks_without_free_pages_the_scanner_overlooks_free_pages() -> None:
    work, memory = steps(3, 1), free(90, kept=-90)
    low, full, odd, even = ("MMMMMMMF", "MMMMMMMM"), "MMMMMMMM", "MFFMMMMM", "FFMMFFMM"
    # It looks at every page, at every second and so on, until it finds one.
    assert compacted(work, memory, packing(memory, *low, odd, odd, odd, odd)) == (1, {Limit.NOTHING})
    assert compacted(work, memory, packing(memory, *low, odd, odd, odd, odd, full)) == (1, {Limit.NOTHING})
    assert compacted(work, memory, packing(memory, *low, odd, odd, odd, odd, full, full)) == (0, {Limit.FOLIOS})
    assert compacted(work, memory, packing(memory, *low, even, even, even, full, full)) == (1, {Limit.NOTHING})


def test_the_scanner_goes_over_large_folios_at_once_and_overlooks_what_is_behind() -> None:
    work, memory = steps(3, 1), free(90, kept=-90)
    low, full = ("MMMMMMFF", "MMMMMMMM"), "MMMMMMMM"
    # It looks at every second page: the first page behind the folio is odd then.
    assert compacted(work, memory, packing(memory, *low, *["MMMMFFFF"] * 2, full)) == (1, {Limit.NOTHING})
    assert compacted(work, memory, packing(memory, *low, *["4444FFFF"] * 2, full)) == (0, {Limit.FOLIOS})
    assert compacted(work, memory, packing(memory, *low, *["4444FFFF"] * 2)) == (1, {Limit.NOTHING})


def test_after_32_pages_of_a_block_room_for_the_others_is_searched_at_once() -> None:
    work, memory = steps(7, 1), free(9000, kept=-9000)
    low, full, top = "M" * 92 + "F" * 36, "M" * 128, "M" * 96 + "F" * 32
    # Not every page of this one is looked at behind a block without room, although 32 pages are found in it.
    mixed = "F" * 32 + "FM" * 28 + "M" * 40
    assert compacted(work, memory, packing(memory, low, full, mixed, top)) == (1, {Limit.NOTHING})
    assert compacted(work, memory, packing(memory, low, full, mixed, full, top)) == (0, {Limit.FOLIOS})
    # The second search begins with every page again.
    two, odd = "M" * 64 + "F" * 64, "MF" * 32 + "M" * 64
    assert compacted(work, memory, packing(memory, two, full, odd, top)) == (1, {Limit.NOTHING})
    assert compacted(work, memory, packing(memory, two, full, odd, full, top)) == (0, {Limit.FOLIOS})


def test_compaction_frees_zeroes_of_folios_that_it_splits() -> None:
    work, memory = steps(3, 1), free(90, kept=-90)
    trim = trimmed((), range(8), range(1, 8), 2)

    def after(*blocks: str) -> tuple[int, set[Limit], int]:
        packed = Packing(memory, memory_of(*blocks), freed(), trim)
        return *compacted(work, memory, packed), packed.emptied

    # There are free blocks of their order for both, for one, and for none.
    assert after("M" * 8, "M" * 8, "MMMMFFFF", "MMMMFFFF") == (1, {Limit.NOTHING}, 0)
    assert after("M" * 8, "M" * 8, "MMMMFFFF", "MMMMMMMF") == (1, {Limit.NOTHING}, 3)
    assert after("M" * 8, "M" * 8, "MMMMMMMF", "MMMMMMMF") == (1, {Limit.NOTHING}, 7)
    # What a folio left of a larger free block serves those behind it.
    assert after("M" * 8, "M" * 8, "FFFFFFFM") == (1, {Limit.NOTHING}, 3)


def test_what_a_trim_gives_back_is_free_before() -> None:
    memory, blocks = free(90, kept=-90), memory_of("M" * 8, "M" * 8)
    assert compacted(steps(3, 1), memory, Packing(memory, blocks, freed(), trimmed(range(8), (), (), 2))) == (
        1,
        {Limit.NOTHING},
    )


def test_unknown_pages_are_free_if_they_are_few_and_the_lists_of_processors_hold_as_many() -> None:
    work = steps(3, 5)

    def with_listed(listed: int, *blocks: str) -> int:
        memory = FreeMemory((FreeZone((90,), -90, listed=listed),))
        return compacted(work, memory, packing(memory, *blocks))[0]

    assert with_listed(2, "UMMMFFFF", "UMMMFFFF", "MMMMMMMM", "MMMMFFFF", "MMMMFFFF") == 2
    assert with_listed(3, *["UMMMFFFF"] * 4) == 0


def test_a_sample_stands_for_the_memory_of_the_machine() -> None:
    work, memory = steps(3, 50), free(900, kept=-900)
    assert compacted(work, memory, packing(memory, *["MMMMFFFF"] * 5, weight=10)) == (20, {Limit.FOLIOS})


PLENTY = free(90, kept=-90)
UNBOUNDED = 1 << 62


def make(packed: Packing, order: int, folio: int, count: int, holes: int = 0, at_once: int = UNBOUNDED) -> int:
    return packed.make(Shape(order, folio, holes), np.arange(count), at_once)


def test_folios_of_the_pmd_order_do_not_count_as_broken() -> None:
    packed = packing(PLENTY, *["F" * 8] * 4)
    assert make(packed, 3, 3, 1) == 1
    assert make(packed, 2, 2, 4) == 4
    assert packed.broken == 0


def test_made_folios_that_compaction_splits_are_broken() -> None:
    # Four folios of two pages, in a block from which only single pages find a place.
    packed = packing(PLENTY, "F" * 8, "SSSSSSSS", "FMFMFMFM", "FMFMFMFM")
    assert make(packed, 3, 1, 1) == 1
    assert packed.broken == 0
    packed._compact()
    assert packed.broken == 1


def test_what_a_block_becomes() -> None:
    packed = packing(PLENTY, "F" * 8)
    assert make(packed, 3, 1, 1, holes=3) == 1
    assert packed._pages.kind.tolist() == [FREE] * 3 + [MOVES] * 5
    assert packed._pages.folio.tolist() == [0, 0, 0, 0, 1, TAIL, 1, TAIL]
    whole = packing(PLENTY, "F" * 8)
    assert make(whole, 3, 3, 1) == 1
    assert whole._pages.kind.tolist() == [STAYS] * 8


def test_folios_come_from_the_last_zone_first_and_each_zone_is_compacted() -> None:
    zones = FreeMemory((FreeZone((), -90), FreeZone((), -90)))
    blocks = replace(memory_of("F" * 8, "F" * 8), zone=np.array([0, 1], np.int8))
    packed = Packing(zones, blocks, freed())
    make(packed, 3, 3, 1)
    assert packed._pages.kind.tolist() == [FREE] * 8 + [STAYS] * 8
    mixed = memory_of(*["MMMMFFFF"] * 6)
    mixed = replace(mixed, zone=np.array([0] * 3 + [1] * 3, np.int8))
    assert make(Packing(zones, mixed, freed()), 3, 3, 5) == 2


def test_at_once_counts_all_that_is_taken_before_the_first_compaction() -> None:
    packed = packing(PLENTY, *["M" * 8] * 3, *["F" * 8] * 2, own=[range(8 * at, 8 * at + 8) for at in range(3)])
    assert make(packed, 3, 3, 5, at_once=3) == 3


def test_after_compaction_hidden_pages_are_in_sight() -> None:
    packed = packing(PLENTY, "F" * 8, *["MMMMFFFF"] * 12)
    assert make(packed, 3, 3, 6, at_once=2) == 6


def test_a_sample_counts_for_what_is_taken_and_emptied() -> None:
    assert make(packing(free(90, kept=200), *["F" * 8] * 3, weight=10), 3, 3, 25) == 5
    plenty = free(9000, kept=-9000)
    packed = packing(plenty, *["F" * 8] * 3, weight=10)
    assert make(packed, 3, 3, 15) == 15
    assert (packed._pages.kind.reshape(3, 8)[:, 0] == FREE).tolist() == [False, False, True]
    trim = trimmed((), range(8), range(1, 8), 2)
    packed = Packing(plenty, memory_of("M" * 8, "M" * 8, "MMMMMMMF", "MMMMMMMF", weight=10), freed(), trim)
    packed._compact()
    assert packed.emptied == 70


def test_many_unknown_pages_of_a_block_are_those_of_the_kernel() -> None:
    memory = FreeMemory((FreeZone((90,), -90, listed=90),))
    assert compacted(steps(3, 5), memory, packing(memory, *["UUUUMFFF"] * 3))[0] == 2
    assert compacted(steps(3, 5), memory, packing(memory, *["UUUUUMFF"] * 3))[0] == 0


def test_the_scanner_looks_at_every_32nd_page_at_least() -> None:
    low, mixed, full = "M" + "F" * 127, "M" * 32 + "F" + "M" * 95, "M" * 128
    assert make(packing(PLENTY, low, full, mixed, *[full] * 6), 7, 7, 1) == 1


def test_pages_of_zeroes_that_the_trim_freed_are_not_counted_again() -> None:
    packed = Packing(PLENTY, memory_of("MMMMMMMF", "M" * 8, "M" * 8), freed(), trimmed(range(16, 20), (), (), 2))
    packed._compact()
    assert packed.emptied == 0


def test_the_pages_of_a_folio_that_a_step_frees_are_no_folio() -> None:
    packed = packing(PLENTY, "4444MMMM", "F" * 8, own=[range(4)])
    make(packed, 3, 3, 1)
    assert packed._pages.folio.tolist()[:8] == [0] * 8


def test_a_block_that_becomes_small_folios_leaves_those_of_others_whole() -> None:
    numbers = np.random.default_rng(1)
    drawn = ["".join("F" if free else "M" for free in row) for row in numbers.random((40, 64)) < 0.1]
    own = [range(64 * at, 64 * at + 64) for at in range(10, 26)]
    memory, none = free(10**6, kept=-(10**6)), np.zeros(16, np.int64)
    counts = []
    for last in 6, 3:
        folio = np.full(16, 6, np.int8)
        folio[-1] = last
        work = Steps(np.full(16, 6, np.int8), folio, none, none)
        done, _ = reachable(work, Supply(memory, packing=packing(memory, *drawn, own=own)))
        counts.append(int(done.sum()))
    assert counts == [16, 16]
