"""Memory outside of whole PMD ranges beside a visit: the same blocks as in a plan, read again before each batch."""

from __future__ import annotations

from collections import Counter

import pytest

from fakes import FakeSpace, page_runs
from mthp.engine.admission import Candidate
from mthp.engine.planning import plan_parts, plan_space
from mthp.engine.select import PlanOptions
from mthp.engine.smallblocks import BATCH, SmallBlocks
from mthp.means import Means
from mthp.ptes import ORDER_NONE, Pte
from mthp.results import ScanResult
from mthp.vma import Vma

BASE, PAGE = 1 << 40, 4096
MOVABLE = frozenset({"rd", "wr", "mr", "mw", "me", "ac"})


def heap(pages: int = 256 + 16) -> FakeSpace:
    """An arena in front of a mapping that has one whole PMD range, and an edge before it."""
    arena = Vma(BASE, BASE + pages * PAGE, "rw-p", flags=MOVABLE)
    large = Vma(BASE + (8 << 20) - 16 * PAGE, BASE + (10 << 20), "rw-p", flags=MOVABLE)
    return FakeSpace(
        [(vma, *page_runs((vma.size // PAGE, Pte.PRESENT, 0))) for vma in (arena, large)], orders=range(2, 10)
    )


def admit(candidate: Candidate) -> ScanResult:
    return ScanResult.SUCCEED


def test_it_plans_what_a_plan_with_small_has_outside_of_whole_ranges() -> None:
    choice = PlanOptions(orders="16K,64K,1M,2M", max_ptes_none=0)
    folios = plan_parts(heap(), choice)
    whole = plan_space(heap(), PlanOptions(orders="16K,64K,1M,2M", max_ptes_none=0, small=True)).folios
    outside = whole[whole.address != BASE + (8 << 20)]
    assert folios.address.tolist() == outside.address.tolist()
    assert folios.order.tolist() == outside.order.tolist() == [8, 4, 4]


def test_batches_hold_one_order_the_largest_first() -> None:
    space = heap()
    parts = SmallBlocks(space, Means("madvise,move", fill=True), admit)
    parts.plan(PlanOptions(max_ptes_none=0))
    assert parts.left == 3
    first = parts.batch(1 << 30)
    assert [attempt.order for attempt in first.attempts] == [8]
    assert (len(first.addresses), first.progress) == (0, 256)
    second = parts.batch(1 << 30)
    assert [attempt.order for attempt in second.attempts] == [4, 4]
    assert parts.left == 0
    assert not parts.touching


@pytest.mark.parametrize(("most_bytes", "made"), [(0, 1), (3 << 16, 3), (1 << 30, BATCH)])
def test_a_batch_is_bounded_in_bytes_and_blocks(most_bytes: int, made: int) -> None:
    parts = SmallBlocks(heap(pages=400), Means("move"), admit)
    parts.plan(PlanOptions(orders="64K", max_ptes_none=0))
    assert len(parts.batch(most_bytes).attempts) == made


def test_what_changed_since_it_was_planned_or_is_not_admitted_is_left() -> None:
    space, asked = heap(), Counter[int]()

    def some(candidate: Candidate) -> ScanResult:
        asked[candidate.order] += 1
        return ScanResult.EXCEED_NONE_PTE if candidate.filled else ScanResult.SUCCEED

    parts = SmallBlocks(space, Means("move"), some)
    parts.plan(PlanOptions(orders="64K", max_ptes_none=0))
    left = parts.left
    for page in range(16):
        space.write(BASE + page * PAGE, 0, ORDER_NONE, 1)
    space.write(BASE + 16 * PAGE, 0, ORDER_NONE, 1)
    attempts = parts.batch(1 << 30).attempts
    assert asked == {4: BATCH - 1}
    assert len(attempts) == BATCH - 2
    assert BASE not in {attempt.address for attempt in attempts}
    assert parts.left == left - BATCH


def test_nothing_more_is_tried_once_told() -> None:
    parts = SmallBlocks(heap(), Means("move"), admit)
    parts.plan(PlanOptions())
    parts.drop()
    assert parts.left == 0
