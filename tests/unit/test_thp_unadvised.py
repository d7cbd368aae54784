"""PR_THP_DISABLE_EXCEPT_ADVISED, found out by the first batch of moved blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from fakes import FakeSpace, page_runs
from mthp.blockstates import SMALLER_FOLIOS
from mthp.engine.collapse import collapse_space
from mthp.engine.report import CollapseReport
from mthp.engine.select import PlanOptions
from mthp.freememory import FreeMemory, FreeZone, MemoryBlocks
from mthp.geometry import X86_64
from mthp.means import Means
from mthp.ptes import Block, Pte, PteColumns
from mthp.results import BlockOutcome, ScanResult
from mthp.thp_unadvised import REASON, corrected
from mthp.vma import Vma

BASE = 1 << 40
SMALL = BlockOutcome(BASE, 4, ScanResult.ALLOC_HUGE_PAGE_FAIL, SMALLER_FOLIOS, elapsed_ns=1000)
PLENTY = 1 << 40


class Unadvised(FakeSpace):
    """A process that may have THP only where it is advised, on a machine with `free` bytes free."""

    free: int | None = PLENTY

    def free_memory(self) -> FreeMemory | None:
        return None if self.free is None else FreeMemory((FreeZone((0, 0, 0, 0, self.free >> 16), 0),))

    def memory_blocks(self, free: FreeMemory) -> MemoryBlocks | None:
        return None

    def attempt_blocks(self, blocks: Sequence[Block], means: Means, before: PteColumns) -> list[BlockOutcome]:
        outcomes = []
        for address, order in blocks:
            self.attempts.append((address, order))
            vma = next(vma for vma in self.vmas() if vma.start <= address < vma.end)
            if "hg" in vma.flags:
                self.write(address, int(Pte.PRESENT), order, 1 << order)
            outcomes.append(BlockOutcome(address, order, ScanResult.SUCCEED, elapsed_ns=1000))
        return outcomes


def space_of(*advised: bool, free: int | None = PLENTY) -> Unadvised:
    """Return a mapping of 4 MiB of base pages for each of `advised`."""
    size = 2 * X86_64.pmd_size
    space = Unadvised(
        (
            Vma(BASE + 2 * at * size, BASE + 2 * at * size + size, "rw-p", flags=frozenset({"hg"} if hg else ())),
            *page_runs((size // 4096, Pte.PRESENT, 0)),
        )
        for at, hg in enumerate(advised)
    )
    space.free = free
    return space


def moved(space: FakeSpace) -> CollapseReport:
    return collapse_space(space, PlanOptions(orders="64K"), Means(mechanism="move"))


def test_a_batch_that_came_back_small_ends_the_run() -> None:
    space = space_of(False)
    report = moved(space)
    tally = report.folios[4]
    assert len(space.attempts) < tally.planned == 64
    assert tally.failed == {(ScanResult.VMA_CHECK, REASON): 64}
    assert not report.complete


def test_memory_that_is_advised_is_moved_all_the_same() -> None:
    space = space_of(False, True, False)
    tally = moved(space).folios[4]
    assert (tally.made, tally.failed.total(), tally.not_tried) == (64, 128, 0)
    assert set(tally.failed) == {(ScanResult.VMA_CHECK, REASON)}
    assert len(space.attempts) < 64 + 64


@pytest.mark.parametrize("free", [None, 0, 65536])
def test_where_the_machine_has_no_such_folios_it_is_the_machine(free: int | None) -> None:
    space = space_of(False, free=free)
    tally = moved(space).folios[4]
    assert tally.failed == {(SMALL.result, SMALL.reason): 64}
    assert len(space.attempts) == 64


def test_one_folio_shows_that_it_is_not_the_process() -> None:
    space = space_of(False)
    blocks = [(BASE + at * 65536, 4) for at in range(3)]
    outcomes = [SMALL, BlockOutcome(*blocks[1], ScanResult.SUCCEED, elapsed_ns=1000), SMALL]
    assert corrected(space, blocks, outcomes) == outcomes


def test_a_refusal_and_a_failed_call_are_no_small_folios() -> None:
    space = space_of(False)
    refused = BlockOutcome(BASE, 4, ScanResult.PAGE_COUNT, "pinned")
    no_memory = replace(SMALL, errno=12, reason="no memory")
    huge = replace(SMALL, order=9, reason="")
    outcomes = [refused, no_memory, huge]
    assert corrected(space, [(BASE, 4), (BASE + 65536, 4), (BASE, 9)], outcomes) == outcomes
