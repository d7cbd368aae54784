"""What of some steps memory allows, and the free memory that Linux shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fakes import FakeSpace, page_runs
from mthp.cli import main
from mthp.cli.render.planned import reach_table
from mthp.engine.packing import Freed, Packing, Trimmed
from mthp.engine.planning import plan_space
from mthp.engine.reach import Limit, Steps, Supply, reachable
from mthp.engine.reached import NO_BLOCKS, reach_of
from mthp.engine.select import PlanOptions
from mthp.errors import UnsupportedError
from mthp.freememory import (
    FREE,
    MOVES,
    STAYS,
    TAIL,
    UNKNOWN,
    FreeMemory,
    FreeZone,
    MemoryBlocks,
    parse_free_memory,
)
from mthp.linux.memorylimits import free_memory
from mthp.means import Means
from mthp.ptes import Pte
from mthp.vma import Vma

BASE = 1 << 40
EXAMPLE = Path(__file__).parents[2] / "example.parquet"

BUDDYINFO = """\
Node 0, zone      DMA      0      0      1      0
Node 0, zone   Normal      8      3      0      2
"""
ZONEINFO = """\
Node 0, zone      DMA
  per-node stats
      nr_inactive_anon 7
  pages free     4
        min      10
        low      12
        protection: (0, 40, 90, 90)
              high_min: 6
Node 0, zone   Normal
  pages free     30
        boost    2
        nr_zone_inactive_file 1
        nr_zone_active_file 1
        min      7
        low      8
        spanned  64
        protection: (0, 0, 0, 0)
  pagesets
    cpu: 0
              count:    7
              high:     40
              high_min: 12
    cpu: 1
              count:    2
              high:     4
              high_min: 4
  start_pfn:           64
"""


def test_the_texts_of_linux_are_read_zone_by_zone() -> None:
    dma, normal = parse_free_memory(BUDDYINFO, ZONEINFO).zones
    assert (dma.kept, dma.spare) == (100, 0)
    assert normal == FreeZone((8, 3, 0, 2), 5, listed=9, unlisted=5, frames=(64, 128))
    free = FreeMemory((dma, normal))
    assert [free.folios(order) for order in (1, 2, 3)] == [11, 4, 2]
    assert (free.listed, free.unlisted) == (9, 5)
    assert free.plus(4).spare == free.spare + 4


@pytest.mark.parametrize("change", [("_file 1", "_file 0"), ("  start_pfn", "  node_unreclaimable:  1\n  start_pfn")])
def test_a_boost_of_the_watermarks_stays_where_kswapd_has_nothing_to_reclaim(change: tuple[str, str]) -> None:
    assert parse_free_memory(BUDDYINFO, ZONEINFO).zones[1].kept == 5
    assert parse_free_memory(BUDDYINFO, ZONEINFO.replace(*change)).zones[1].kept == 7


@pytest.mark.parametrize("noise", ["Node", "Node 0, zone   Normal a b", "Node 0, zone   Normal, type", "\0"])
def test_lines_that_are_none_of_these_are_passed_over(noise: str) -> None:
    texts = [f"{noise}\n{text}{noise}\n" for text in (BUDDYINFO, ZONEINFO)]
    assert parse_free_memory(*texts) == parse_free_memory(BUDDYINFO, ZONEINFO)


@pytest.mark.parametrize("missing", ["buddyinfo", "zoneinfo"])
def test_where_the_kernel_shows_nothing_nothing_is_known(tmp_path: Path, missing: str) -> None:
    for name, text in {"buddyinfo": BUDDYINFO, "zoneinfo": ZONEINFO}.items():
        (tmp_path / name).write_text(text if name != missing else "")
    assert free_memory(tmp_path) is None


def steps(order: int, count: int, *, filled: int = 0) -> Steps:
    columns = (np.full(count, number, np.int64) for number in (0, filled))
    orders = np.full(count, order, np.int8)
    return Steps(orders, orders, *columns)


def free(*blocks: int, kept: int = 0) -> FreeMemory:
    return FreeMemory((FreeZone(blocks, kept),))


def made(work: Steps, supply: Supply) -> tuple[int, set[Limit]]:
    done, limits = reachable(work, supply)
    return int(done.sum()), set(limits.values())


def test_each_step_takes_a_block_and_leaves_small_pages() -> None:
    work = steps(3, 5)
    assert made(work, Supply(free(90, 0, 0, 2))) == (2, {Limit.FOLIOS})
    assert made(work, Supply(free(0, 0, 0, 5))) == (5, {Limit.NOTHING})
    # The first two together release a block.
    merged = {3: np.array([0, 1, 0, 0, 0])}
    assert made(work, Supply(free(90, 0, 0, 2), merged=merged)) == (3, {Limit.FOLIOS})


def memory_of(*blocks: str, weight: int = 1) -> MemoryBlocks:
    """Return blocks of some pages: F is free, M moves, S stays, U is unknown; a block in lower case is closed.

    4444 is a movable folio of four pages, 22 one of two.
    """
    kinds = {"F": FREE, "M": MOVES, "S": STAYS, "U": UNKNOWN, "2": MOVES, "4": MOVES}
    pages = np.array([[kinds[page] for page in block.upper()] for block in blocks], np.int8)
    folios = np.zeros_like(pages)
    for order, digit in (1, "2"), (2, "4"):
        large = np.array([[page == digit for page in block] for block in blocks])
        folios[large] = TAIL
        folios[:, :: 1 << order][large[:, :: 1 << order]] = order
    closed = np.array([block.islower() for block in blocks])
    order = len(blocks[0]).bit_length() - 1
    return MemoryBlocks(order, np.arange(len(blocks)), np.zeros(len(blocks), np.int8), pages, folios, closed, weight)


def freed(*by_step: Sequence[int]) -> Freed:
    steps = [step for step, frames in enumerate(by_step) for _ in frames]
    return Freed(np.array([frame for frames in by_step for frame in frames], np.int64), np.array(steps, np.intp))


def packing(memory: FreeMemory, *blocks: str, own: Sequence[Sequence[int]] = (), weight: int = 1) -> Packing:
    return Packing(memory, memory_of(*blocks, weight=weight), freed(*own))


def compacted(work: Steps, memory: FreeMemory, packed: Packing, room: int | None = None) -> tuple[int, set[Limit]]:
    return made(work, Supply(memory, room, packed, hidden=20, room_of_machine=True))


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


def trimmed(freed: Sequence[int], kept: Sequence[int], zero: Sequence[int], order: int) -> Trimmed:
    """Return the pages of a trimmed folio: frames that become free, and frames of folios of `order`."""
    frame = np.array([*freed, *kept], np.int64)
    folio = np.where(frame % (1 << order) == 0, order, TAIL).astype(np.int8)
    return Trimmed(frame, np.isin(frame, freed), folio, np.isin(frame, [*freed, *zero]))


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


def test_pages_in_lists_of_processors_are_out_of_sight_until_compaction() -> None:
    work, plenty = steps(3, 5), free(0, 0, 0, 9)
    assert made(work, Supply(plenty, room=28, hidden=21, room_of_machine=True)) == (3, {Limit.ROOM})
    assert made(work, Supply(plenty, room=28, hidden=20, room_of_machine=True)) == (5, {Limit.NOTHING})
    assert made(work, Supply(free(0, 0, 0, 5), hidden=20)) == (5, {Limit.NOTHING})
    assert made(work, Supply(plenty, room=28, hidden=21)) == (5, {Limit.NOTHING})
    # A block that became free is of use only when its pages have left the list, which those freed next push out.
    merged = {3: np.array([1, 1, 1, 1, 1])}
    assert made(work, Supply(free(90, 0, 0, 1), merged=merged)) == (5, {Limit.NOTHING})
    assert made(work, Supply(free(90, 0, 0, 1), merged=merged, hidden=8)) == (1, {Limit.FOLIOS})
    assert made(work, Supply(free(90, 0, 0, 2), merged=merged, hidden=8)) == (5, {Limit.NOTHING})
    full = ["F" * 8] * 9
    assert compacted(work, plenty, packing(plenty, *full), room=24) == (3, {Limit.ROOM})
    assert compacted(work, plenty, packing(plenty, *full), room=28) == (5, {Limit.NOTHING})


def test_what_is_kept_and_the_room_of_the_cgroup_limit_as_it_grows() -> None:
    work = steps(3, 5, filled=4)
    plenty = free(0, 0, 0, 9)
    assert made(work, Supply(free(0, 0, 0, 9, kept=60))) == (2, {Limit.KEPT})
    assert made(work, Supply(plenty, room=16)) == (3, {Limit.ROOM})
    assert made(work, Supply(plenty, room=7)) == (0, {Limit.ROOM})
    assert made(work, Supply(plenty)) == (5, {Limit.NOTHING})


def test_smaller_orders_come_of_what_larger_ones_leave() -> None:
    work = Steps.joined([steps(3, 2), steps(2, 5)])
    done, limits = reachable(work, Supply(free(0, 0, 1, 3)))
    assert done.tolist() == [True, True, True, True, True, False, False]
    assert limits == {3: Limit.NOTHING, 2: Limit.FOLIOS}


class OnMachine(FakeSpace):
    """Two PMD ranges on a machine with some free memory."""

    def __init__(self, free: FreeMemory | None, blocks: MemoryBlocks | None = None) -> None:
        pages = 2 * 512
        vma = Vma(BASE, BASE + pages * 4096, "rw-p", "", flags=frozenset({"hg"}))
        super().__init__([(vma, *page_runs((pages, Pte.PRESENT, 0)))])
        self._free, self._blocks = free, blocks

    def free_memory(self) -> FreeMemory | None:
        return self._free

    def memory_blocks(self, free: FreeMemory) -> MemoryBlocks | None:
        return self._blocks


def test_a_backend_without_free_memory_says_so() -> None:
    space = OnMachine(None)
    plan = plan_space(space, PlanOptions(orders=[9]))
    with pytest.raises(UnsupportedError, match="cannot be seen"):
        reach_of(space, plan, Means())


def test_what_cannot_be_known_has_its_reason() -> None:
    space = OnMachine(free(*[0] * 9, 1))
    plan = plan_space(space, PlanOptions(orders=[9]))
    reach = reach_of(space, plan, Means(max_bloat=None))
    assert (reach.now.coverage, reach.now.size) == (0.5, 2 << 20)
    assert reach.now.limit == "no free folio of 2M is left"
    assert (reach.compacted.coverage, reach.compacted.limit) == (None, NO_BLOCKS)
    known = OnMachine(space.free_memory(), memory_of("F" * 512))
    trimmed = reach_of(known, plan, Means()).trimmed
    assert trimmed.coverage is None
    assert "no contents" in trimmed.limit


def test_the_table_fits_into_a_terminal_and_names_what_limits_each_way() -> None:
    space = OnMachine(free(*[0] * 9, 1))
    plan = plan_space(space, PlanOptions(orders=[9]))
    reach = reach_of(space, plan, Means(max_bloat=None))
    heads, lines = reach_table(plan, reach).laid_out(80)
    assert max(map(len, heads + lines)) <= 80
    text = " ".join(" ".join(heads + lines).split())
    assert "50.0%" in text
    assert "1 of 2M" in text
    assert reach.now.limit in text


def test_a_file_has_no_machine_whose_memory_could_be_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(EXAMPLE), "--reachable"]) == UnsupportedError.exit_code
    assert "free memory of its machine cannot be seen" in capsys.readouterr().err
