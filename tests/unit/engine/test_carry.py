"""Folios below the PMD order: every planned one is accounted for, with its reason, whatever happens meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import FakeSpace, RestingClock, page_runs
from mthp.engine.carry import FIRST_BATCH, PATIENCE
from mthp.engine.collapse import collapse_space
from mthp.engine.report import CollapseReport, FolioTally
from mthp.engine.select import PlanOptions
from mthp.engine.space_plan import SpacePlan
from mthp.errors import MthpError, NotPermittedError, TargetVanishedError
from mthp.geometry import X86_64, geometry_named
from mthp.means import Means, Mechanism
from mthp.pacing import BYTES_BURST_SECONDS
from mthp.ptes import ORDER_NONE, Block, Pte, PteColumns, Segment
from mthp.results import BlockOutcome, ScanResult
from mthp.vma import Vma
from strategies import examples

BASE = 1 << 40
PPC = geometry_named("ppc64-64k")
PMD, PAGE = X86_64.pmd_size, X86_64.page_size
VFORK = "it waits in vfork"
SMALL = range(2, PPC.pmd_order)


class MovingSpace(FakeSpace):
    """A space with blocks that can be moved, in windows of 3, each of a millisecond.

    Attributes:
        batches: the blocks of every call.
        refusals: outcomes that the next calls return for every block.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"orders": range(2, 10)} | options)
        self.batches: list[list[Block]] = []
        self.means: list[Means] = []
        self.refusals: list[str] = []
        self._pauses: list[int] = []

    def attempt_blocks(self, blocks: Sequence[Block], means: Means, before: PteColumns) -> list[BlockOutcome]:
        self._check_alive()
        if means.mechanism == "madvise":
            return super().attempt_blocks(blocks, means, before)
        self.batches.append(list(blocks))
        self.means.append(means)
        if self.refusals:
            reason = self.refusals.pop(0)
            passing = reason == VFORK
            return [BlockOutcome(*block, ScanResult.FAIL, reason, everywhere=True, passing=passing) for block in blocks]
        self._pauses += [1_000_000] * -(-len(blocks) // 3)
        return [self._moved(block, means) for block in blocks]

    def _moved(self, block: Block, means: Means) -> BlockOutcome:
        address, order = block
        state = self.read([(address, address + self.geometry.size_of(order))]).state
        full = ((state & Pte.PRESENT) != 0) & ((state & Pte.ZERO) == 0)
        if not (full.all() or means.fill):
            return BlockOutcome(address, order, ScanResult.EXCEED_NONE_PTE, "it has holes")
        return self.attempt(address, order)

    def take_pauses(self) -> list[int]:
        pauses, self._pauses = self._pauses, []
        return pauses


def pages_of(*runs: tuple[int, int], cls: type[MovingSpace] = MovingSpace, **more: Any) -> MovingSpace:
    """One mapping of runs of (present pages, missing pages)."""
    pairs = [part for full, empty in runs for part in ((full, Pte.PRESENT, 0), (empty, 0, ORDER_NONE))]
    size = sum(pages for pages, _, _ in pairs) * more.get("geometry", X86_64).page_size
    return cls([(Vma(BASE, BASE + size, "rw-p"), *page_runs(*pairs))], **more)


def moved(space: FakeSpace, stop: Any = lambda: False, **options: Any) -> CollapseReport:
    dry_run = options.pop("dry_run", False)
    clock = options.pop("clock", None)
    names = ("mechanism", "max_bloat", "rate", "max_pause", "pause_share", "fill", "verify")
    own = {name: options.pop(name) for name in names if name in options}
    plan = PlanOptions(**({"max_ptes_none": 0} | options))
    return collapse_space(
        space, plan, Means(**({"mechanism": "move", "max_bloat": None} | own)), dry_run=dry_run, stop=stop, clock=clock
    )


def accounted(tally: FolioTally) -> int:
    return tally.made + tally.unchanged + tally.left


def orders_now(space: FakeSpace) -> list[int]:
    columns = FakeSpace.read(space, [(vma.start, vma.end) for vma in FakeSpace.vmas(space)])
    return [int(order) for order in columns.folio_order]


@settings(max_examples=examples(150))
@given(st.data())
def test_every_folio_is_accounted_for(data: st.DataObject) -> None:
    runs = data.draw(st.lists(st.tuples(st.integers(0, 32), st.integers(0, 32)), min_size=1, max_size=6))
    total = sum(map(sum, runs))
    runs.append((0, -total % PPC.ptes_per_pmd))
    fails = data.draw(
        st.dictionaries(
            st.integers(0, total // 4).map(lambda block: BASE + block * PPC.size_of(2)),
            st.sampled_from(list(ScanResult)),
            max_size=6,
        )
    )
    max_bloat = data.draw(st.one_of(st.none(), st.integers(0, 40).map(lambda pages: pages * PPC.page_size)))
    fill = data.draw(st.booleans())
    stops = iter([*[False] * data.draw(st.integers(0, 8)), *[True] * 500])
    space = pages_of(*runs, geometry=PPC, fails=fails)
    before = orders_now(space)
    report = moved(
        space,
        lambda: next(stops),
        fill=fill,
        max_bloat=max_bloat,
        max_ptes_none=data.draw(st.sampled_from([0, 8, PPC.ptes_per_pmd - 1])),
    )

    planned = report.plan.folios_by_order
    assert list(report.folios) == list(planned)
    for order, tally in report.folios.items():
        assert (tally.planned, accounted(tally)) == (planned[order], planned[order])
        assert all(tally.failed.values())
        assert all(reason for _, reason in tally.failed)
    now = orders_now(space)
    for order, tally in report.folios.items():
        assert now.count(order) - before.count(order) == tally.made << order
    became = sum(1 for was, order in zip(before, now, strict=True) if was == ORDER_NONE != order)
    assert report.filled_bytes == became * PPC.page_size
    assert report.filled_bytes == 0 or fill
    assert max_bloat is None or report.filled_bytes <= max_bloat
    assert report.moved_bytes == report.copied_bytes + report.filled_bytes
    assert report.windows.count == sum(-(-len(batch) // 3) for batch in space.batches)
    assert report.moved_blocks == sum(map(len, space.batches))
    left = any(tally.left for tally in report.folios.values())
    assert report.complete == (not report.interrupted and not left and not report.done_nothing)


class SlowSpace(MovingSpace):
    """Takes `fixed` seconds of `clock` to make ready and `each` for a block."""

    clock: RestingClock
    fixed, each = 0.0, 0.0

    def attempt_blocks(self, blocks: Sequence[Block], means: Means, before: PteColumns) -> list[BlockOutcome]:
        self.clock.time += self.fixed + self.each * len(blocks)
        return super().attempt_blocks(blocks, means, before)


@pytest.mark.parametrize(
    ("fixed", "each", "last"),
    [
        (0.0, 0.001, (90, 110)),  # a tenth of a second
        (0.05, 0.001, (40, 60)),
        (0.3, 0.01, (16, 16)),  # to make ready takes longer than that alone
        (0.3, 0.1, (6, 8)),  # about a second
        (3.0, 0.1, (1, 2)),
    ],
)
def test_what_it_takes_to_make_ready_is_not_spent_on_every_block(
    fixed: float, each: float, last: tuple[int, int]
) -> None:
    space = pages_of((4096, 0), cls=SlowSpace)
    assert isinstance(space, SlowSpace)
    space.clock, space.fixed, space.each = RestingClock(), fixed, each
    assert moved(space, orders=(2,), clock=space.clock).complete
    low, high = last
    assert all(low <= len(batch) <= high for batch in space.batches[-5:-1])


def test_the_largest_come_first_and_of_each_the_fullest() -> None:
    space = pages_of((16, 0), (31, 1), (32, 0), (64, 0), (368, 0), (512, 0))
    report = moved(space, max_ptes_none=511, fill=True)
    assert report.complete
    orders = [order for batch in space.batches for _, order in batch]
    assert orders == sorted(orders, reverse=True)
    assert all(len({order for _, order in batch}) == 1 for batch in space.batches)


def test_the_pmd_order_is_made_by_the_call_and_smaller_ones_by_moving() -> None:
    space = pages_of((512, 0), (64, 448))
    report = moved(space, mechanism="madvise,move")
    assert (report.ranges.made, report.durations.count) == (1, 1)
    assert space.batches == [[(BASE + PMD, 6)]]
    assert report.folios[6].made == 1
    assert report.complete
    assert report.copied_bytes == 576 * PAGE


def test_the_means_are_handed_on() -> None:
    space = pages_of((64, 448))
    moved(space, max_pause=0.002, pause_share=0.25, verify=True)
    assert space.means == [Means("move", max_bloat=None, max_pause=0.002, pause_share=0.25, verify=True)]


def test_moving_plans_the_orders_below_the_pmd_order() -> None:
    report = moved(pages_of((512, 0)))
    assert report.plan.orders == tuple(range(2, 9))
    assert report.folios[8].made == 2


def test_a_dry_run_moves_nothing() -> None:
    space = pages_of((64, 448))
    report = moved(space, dry_run=True)
    assert space.batches == []
    assert report.folios == {6: FolioTally(planned=1, not_tried=1)}
    assert report.complete


def test_it_is_announced_before_anything_is_moved() -> None:
    told: list[tuple[str, int]] = []
    space = pages_of((512, 0), (64, 448))
    choice, means = PlanOptions(max_ptes_none=0), Means(mechanism="madvise,move")

    def announce(plan: SpacePlan, mechanism: Mechanism) -> None:
        assert mechanism == "move"
        told.append((plan.label, len(space.batches)))

    collapse_space(space, choice, means, before_move=announce)
    assert told == [(space.label, 0)]
    collapse_space(space, choice, means, before_move=announce)
    assert len(told) == 1


def test_a_refusal_that_passes_is_waited_for() -> None:
    space = pages_of((64, 448))
    space.refusals = [VFORK] * 3
    report = moved(space, clock=RestingClock())
    assert report.complete
    assert len(space.batches) == 4


def test_a_refusal_that_stays_is_the_reason_of_all_and_is_not_asked_for_each() -> None:
    space = pages_of(*[(64, 0), (448, 0)] * 50)
    space.refusals = ["a filter guards it"] * 1000
    report = moved(space, orders="16K,64K", clock=RestingClock())
    assert len(space.batches) == 1
    assert report.folios[4].failed == {(ScanResult.FAIL, "a filter guards it"): 50 * 32}
    assert report.folios[4].not_tried == 0
    assert not report.complete


def test_a_thread_that_never_stops_is_not_waited_for_again_and_again() -> None:
    space = pages_of(*[(64, 0), (448, 0)] * 50)
    space.refusals = [VFORK] * 1000
    report = moved(space, orders="16K,64K", clock=RestingClock())
    tries = len(PATIENCE) + 1
    assert len(space.batches) == tries
    assert report.folios[4].failed == {(ScanResult.FAIL, f"{VFORK} (tried {tries} times)"): 50 * 32}


class Stuck(MovingSpace):
    """Every second block of a batch is refused since a thread does not stop, but a block that is alone."""

    def attempt_blocks(self, blocks: Sequence[Block], means: Means, before: PteColumns) -> list[BlockOutcome]:
        outcomes = super().attempt_blocks(blocks, means, before)
        if len(blocks) == 1:
            return outcomes
        for index in range(1, len(blocks), 2):
            self.write(blocks[index][0], int(Pte.PRESENT), 0, 1 << blocks[index][1])
            outcomes[index] = BlockOutcome(*blocks[index], ScanResult.FAIL, VFORK, everywhere=True, passing=True)
        return outcomes


def test_only_the_blocks_that_were_refused_are_tried_again() -> None:
    space = pages_of((64, 448), cls=Stuck)
    report = moved(space, orders="64K")
    assert report.complete
    assert [len(batch) for batch in space.batches] == [4, 2, 1]
    assert report.folios[4].made == 4


class Failing(MovingSpace):
    """Raises at the n-th batch."""

    left = 1
    error: MthpError = NotPermittedError("the switch may not be written", help="run as root")

    def attempt_blocks(self, blocks: Sequence[Block], means: Means, before: PteColumns) -> list[BlockOutcome]:
        if self.left == 0:
            raise self.error
        self.left -= 1
        return super().attempt_blocks(blocks, means, before)


def test_an_error_in_the_middle_does_not_lose_the_report() -> None:
    space = pages_of(*[(16, 0)] * 96, cls=Failing)
    report = moved(space, orders="64K", clock=RestingClock())
    tally = report.folios[4]
    assert tally.made == FIRST_BATCH
    [(cause, failed)] = tally.failed.items()
    assert cause == (ScanResult.FAIL, "the switch may not be written")
    assert 0 < failed == 96 - FIRST_BATCH - tally.not_tried
    assert tally.not_tried > 0
    assert accounted(tally) == 96
    assert report.error is Failing.error
    nothing = pages_of(*[(16, 0)] * 96, cls=Failing)
    nothing.__dict__["left"] = 0
    with pytest.raises(NotPermittedError):
        moved(nothing, orders="64K")


@settings(max_examples=examples(60))
@given(st.integers(0, 12), st.booleans())
def test_a_target_that_vanishes_is_accounted_for(after: int, while_read: bool) -> None:
    class Dying(MovingSpace):
        left = after

        def read(self, segments: Sequence[Segment]) -> PteColumns:
            self.tick(while_read)
            return super().read(segments)

        def attempt_blocks(self, blocks: Sequence[Block], means: Means, before: PteColumns) -> list[BlockOutcome]:
            self.tick(not while_read)
            return super().attempt_blocks(blocks, means, before)

        def tick(self, counts: bool) -> None:
            self.vanished |= counts and self.left == 0
            self.left -= counts

    space = pages_of(*[(16, 0), (8, 8)] * 16, cls=Dying)
    try:
        report = moved(space)
    except TargetVanishedError:
        assert not space.batches
        return
    for tally in report.folios.values():
        assert accounted(tally) == tally.planned
    assert report.vanished == space.vanished
    assert not (report.vanished and report.complete)


def test_a_rate_holds_for_both_parts() -> None:
    clock = RestingClock()
    space = pages_of((512, 0), (256, 256), (256, 256))
    assert moved(space, mechanism="madvise,move", rate=1 << 20, clock=clock).complete
    # 2 MiB by the call, then 1 MiB twice: the second waits for 3 s in all.
    assert sum(clock.rests) == pytest.approx(3.0, abs=BYTES_BURST_SECONDS)


def test_what_is_large_already_is_left() -> None:
    space = pages_of((512, 0))
    space.write(BASE, Pte.PRESENT, 6, pages=64)
    report = moved(space, orders="16K,64K")
    assert report.folios[4].unchanged + report.folios[4].made == report.folios[4].planned
    assert np.array_equal(orders_now(space)[:64], [6] * 64)
