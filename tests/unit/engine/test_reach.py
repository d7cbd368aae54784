"""What of some steps memory allows, and the free memory that Linux shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fakes import FakeSpace, page_runs
from mthp.cli import main
from mthp.cli.render.plan import reach_table
from mthp.engine.planning import plan_space
from mthp.engine.reach import Limit, Steps, Supply, reachable
from mthp.engine.reached import NO_TYPES, reach_of
from mthp.engine.select import PlanOptions
from mthp.errors import UnsupportedError
from mthp.freememory import FreeMemory, FreeZone, parse_free_memory
from mthp.linux.headroom import free_memory
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
        boost    0
        min      5
        low      6
      nr_zone_inactive_anon 20
      nr_zone_active_anon 10
      nr_zone_inactive_file 1
      nr_zone_active_file 2
      nr_zone_unevictable 3
        protection: (0, 0, 0, 0)
"""
PAGETYPEINFO = """\
Page block order: 3
Pages per block:  8

Free pages count per migrate type at order       0      1      2      3
Node    0, zone      DMA, type    Unmovable      0      0      1      0
Node    0, zone      DMA, type      Movable      0      0      0      0
Node    0, zone   Normal, type    Unmovable      0      0      0      0
Node    0, zone   Normal, type      Movable     >5      3      0      2

Number of blocks type     Unmovable      Movable      Isolate
Node 0, zone      DMA            1            0            0
Node 0, zone   Normal            2            6            0
"""


def test_the_texts_of_linux_are_read_zone_by_zone() -> None:
    dma, normal = parse_free_memory(BUDDYINFO, ZONEINFO, PAGETYPEINFO).zones
    assert (dma.kept, dma.spare) == (100, 0)
    assert normal == FreeZone((8, 3, 0, 2), 5, movable=30, used=18, listed=36)
    free = FreeMemory((dma, normal))
    assert free.known_types
    assert [free.folios(order) for order in (1, 2, 3)] == [11, 4, 2]
    assert free.packed() == 0.5
    assert free.packed(sure=6) == 0.4
    assert free.plus(4).spare == free.spare + 4
    assert not parse_free_memory(BUDDYINFO, ZONEINFO).known_types


@pytest.mark.parametrize("noise", ["Node", "Node 0, zone   Normal a b", "Node 0, zone   Normal, type", "\0"])
def test_lines_that_are_none_of_these_are_passed_over(noise: str) -> None:
    texts = [f"{noise}\n{text}{noise}\n" for text in (BUDDYINFO, ZONEINFO, PAGETYPEINFO)]
    assert parse_free_memory(*texts) == parse_free_memory(BUDDYINFO, ZONEINFO, PAGETYPEINFO)
    cut = PAGETYPEINFO.replace("            2            6            0", "            2")
    assert parse_free_memory(BUDDYINFO, ZONEINFO, cut).zones[1].movable is None


@pytest.mark.parametrize("missing", ["buddyinfo", "zoneinfo"])
def test_where_the_kernel_shows_nothing_nothing_is_known(tmp_path: Path, missing: str) -> None:
    for name, text in {"buddyinfo": BUDDYINFO, "zoneinfo": ZONEINFO}.items():
        (tmp_path / name).write_text(text if name != missing else "")
    assert free_memory(tmp_path) is None


def steps(order: int, count: int, *, filled: int = 0, released: int | None = None) -> Steps:
    pages = (1 << order) - filled if released is None else released
    columns = (np.full(count, number, np.int64) for number in (pages, 0, filled))
    return Steps(np.full(count, order, np.int8), *columns)


def free(*blocks: int, kept: int = 0, movable: int | None = None) -> FreeMemory:
    return FreeMemory((FreeZone(blocks, kept, movable),))


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


def test_compaction_makes_blocks_of_what_is_free_where_memory_moves() -> None:
    work = steps(3, 5)
    assert made(work, Supply(free(90, movable=8), compacted=True)) == (5, {Limit.NOTHING})
    assert made(work, Supply(free(90, movable=7), compacted=True)) == (0, {Limit.FOLIOS})
    elsewhere = steps(3, 5, released=0)
    assert made(elsewhere, Supply(free(90, movable=30), compacted=True)) == (3, {Limit.FOLIOS})
    # It needs two blocks' worth of free memory (compact_gap).
    assert made(work, Supply(free(15, movable=15), compacted=True)) == (0, {Limit.FOLIOS})


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

    def __init__(self, free: FreeMemory | None) -> None:
        pages = 2 * 512
        vma = Vma(BASE, BASE + pages * 4096, "rw-p", "", flags=frozenset({"hg"}))
        super().__init__([(vma, *page_runs((pages, Pte.PRESENT, 0)))])
        self._free = free

    def free_memory(self) -> FreeMemory | None:
        return self._free


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
    assert (reach.compacted.coverage, reach.compacted.limit) == (None, NO_TYPES)
    known = OnMachine(free(*[0] * 9, 1, movable=512))
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
