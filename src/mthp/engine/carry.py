"""Carry out planned folios, batch by batch: read, admit, collapse, report.

Each batch is read first. The reading shows what filling a block costs now, so that a bloat budget is never overspent,
and drops blocks that went away since the plan was made. The outcome of a block is the one that
:meth:`~mthp.addrspace.AddressSpace.collapse_blocks` returns, because that is read from the page tables.

The most valuable blocks come first (:meth:`~mthp.engine.space_plan.SpacePlan.ranked`), by their heat, or without heat
by how full they are, so that a budget buys as much as it can. The size of a batch, and which blocks are tried again,
depend on the mechanism:

- ``madvise`` collapses one PMD range at a time;
- ``split`` makes all blocks of a PMD range at once, the most valuable ranges first;
- ``move`` takes as many blocks of one order as do not delay Ctrl-C for long, because the backend turns on that order's
  switch for the batch; it tries blocks again that were refused for a passing reason;
- ``khugepaged`` takes all blocks, in windows, until one makes nothing new. The kernel chooses the ranges, so this
  mechanism keeps no budget, and fills holes only without one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from mthp import thp_unadvised
from mthp.abilities import take_calls, take_pauses
from mthp.blockstates import BlockStates, states_of
from mthp.engine.admission import Admission, Candidate, collapse_batch
from mthp.engine.report import FolioTally
from mthp.engine.space_plan import Folios
from mthp.engine.work import Work
from mthp.errors import MthpError, TargetVanishedError
from mthp.means import Mechanism
from mthp.ptes import Block, Pte, PteColumns, Segment, segments_of
from mthp.results import BlockOutcome, ScanResult

FIRST_BATCH, LARGEST_BATCH = 16, 512
"""Blocks in the first batch, and in the largest."""

LARGEST_BATCH_BYTES = 64 << 20

BATCH_SECONDS = 0.1
"""Seconds that a batch should take, rests included."""

SMALL_BATCH_SECONDS = 1.0
"""Seconds that a batch of at most `FIRST_BATCH` blocks may take: on a slow or busy machine preparing a batch takes
longer than `BATCH_SECONDS`, and that cost must not be paid for every single block."""

PATIENCE = (0.02, 0.1, 0.5, 2.0)
"""Seconds to wait before blocks are tried again that were refused for a passing reason: vfork(2), a thread in state D.

A child of vfork(2) executes another program within milliseconds, and a disk answers within a second. A reason that
lasts longer than the sum hardly ends while we wait.
"""

_LARGE_BEFORE = frozenset({ScanResult.PMD_MAPPED, ScanResult.PTE_MAPPED_HUGEPAGE})


class Carrier:
    """Carries out the folios of one mechanism.

    Attributes:
        seconds: duration of each of the kernel's calls, in seconds.
        pauses_ns: how long the target was stopped in each window, in nanoseconds.
        made: the blocks that lie in one folio now and did not before.
    """

    def __init__(self, work: Work, mechanism: Mechanism) -> None:
        self.seconds: list[float] = []
        self.pauses_ns: list[int] = []
        self.made: list[Block] = []
        self._work = work
        self._mechanism = mechanism
        self._geometry = work.space.geometry
        self._means = dataclasses.replace(work.means, mechanism=mechanism)
        fills = work.means.fill or mechanism == "split"
        self._admission = Admission(work.space, work.room, work.bloat_left, fills=fills)
        self._batch_size = FIRST_BATCH
        self._refused: BlockOutcome | None = None
        # Bytes outside the blocks of a batch that a split copies with them.
        self._beside = 0

    def carry_out(self, folios: Folios) -> None:
        """Make `folios`.

        Raises:
            MthpError: the collapse cannot go on; the report holds what was done until then.
        """
        for blocks in self._lists(folios):
            done = 0
            while done < len(blocks):
                self._work.keep_pace()
                if self._work.stop_requested():
                    return
                if self._mechanism == "khugepaged":
                    self._in_windows(blocks)
                    return
                done += self._batch(blocks[done : done + self._count(blocks[0][1])])

    def _count(self, order: int) -> int:
        """Return the number of blocks in a batch of a list that begins with a block of `order`."""
        if self._mechanism == "split":
            return self._geometry.ptes_per_pmd
        size = self._geometry.size_of(order)
        return self._work.most_at_once(size, min(self._batch_size, max(1, LARGEST_BATCH_BYTES // size)))

    def _lists(self, folios: Folios) -> Iterator[list[Block]]:
        """Yield lists of blocks, ranked as in the plan.

        One list an order; for ``split`` one a PMD range, for ``khugepaged`` one in all.
        """
        by_rank = self._work.report.plan.ranked(folios)
        if self._mechanism == "khugepaged":
            yield list(zip(by_rank.address.tolist(), by_rank.order.tolist(), strict=True))
            return
        if self._mechanism == "split":
            yield from self._by_range(folios)
            return
        for order in dict.fromkeys(by_rank.order.tolist()):
            yield [(address, order) for address in by_rank.address[by_rank.order == order].tolist()]

    def _by_range(self, folios: Folios) -> Iterator[list[Block]]:
        """Yield the blocks of each PMD range, the most valuable ranges first, of equals those with least to fill."""
        ranks = self._work.report.plan.range_ranks(folios).tolist()
        blocks: list[list[Block]] = [[] for _ in range(max(ranks, default=-1) + 1)]
        for rank, address, order in zip(ranks, folios.address.tolist(), folios.order.tolist(), strict=True):
            blocks[rank].append((address, order))
        yield from blocks

    def _batch(self, blocks: list[Block]) -> int:
        """Make some blocks of one order, or of one PMD range; return the number of blocks that are finished."""
        # A refusal of the whole process holds for every later block, so none is tried again.
        if self._refused is not None:
            for block in blocks:
                self._account(dataclasses.replace(self._refused, address=block[0], order=block[1]))
            return len(blocks)
        self._admission.renew()
        columns = self._work.space.read(self._segments(blocks))
        before = states_of(columns, blocks, self._geometry)
        if self._mechanism == "split":
            # MADV_COLLAPSE copies the whole PMD range, also the pages outside of planned blocks.
            pages = np.count_nonzero(columns.has(Pte.PRESENT | Pte.SWAP) & ~columns.has(Pte.ZERO))
            self._beside = int(pages - before.contents[~before.large].sum()) * self._geometry.page_size
        at, at_once = 0, 1 if self._mechanism == "madvise" else len(blocks)
        while at < len(blocks) and not (at and self._work.stop_requested()):
            tried, at, is_full = self._admitted(blocks, at, before, at_once)
            if tried:
                self._try(tried, columns)
            self._admission.settle()
            if is_full:
                break
        return at

    def _segments(self, blocks: list[Block]) -> list[Segment]:
        """Return the segments to read before `blocks` are made: a split reads its whole PMD range, which it copies."""
        if self._mechanism != "split":
            return segments_of(blocks, self._geometry.page_size)
        size = self._geometry.pmd_size
        start = blocks[0][0] // size * size
        return [(start, start + size)]

    def _admitted(
        self, blocks: Sequence[Block], at: int, before: BlockStates, at_once: int
    ) -> tuple[list[Block], int, bool]:
        """Choose up to `at_once` blocks to try, from index `at` on, and account for the blocks that are skipped.

        Returns:
            The blocks to try, the index to go on from, and whether the target's memory limits allow no more at once.
        """
        tried: list[Block] = []
        copied_left = self._work.copied_left()
        copied_left = None if copied_left is None else copied_left - self._beside
        for index in range(at, len(blocks)):
            if len(tried) == at_once:
                return tried, index, False
            address, order = blocks[index]
            contents = int(before.contents[index])
            filled, swapped = (1 << order) - contents, int(before.swapped[index])
            if before.large[index]:
                self._done(order).unchanged += 1
                continue
            if contents == 0:
                self._account(BlockOutcome(address, order, ScanResult.NO_PTE_TABLE))
                continue
            # Filled pages are zeroed, not copied, so only contents count against the copy budget.
            size = contents * self._geometry.page_size
            if copied_left is not None and size > copied_left:
                self._done(order).over_copied += 1
                continue
            result = self._admission(Candidate(self._work.space, address, order, contents, filled, swapped))
            if result is ScanResult.SUCCEED:
                tried.append(blocks[index])
                copied_left = None if copied_left is None else copied_left - size
            elif result is ScanResult.EXCEED_NONE_PTE:
                self._done(order).over_budget += 1
            elif result is not ScanResult.CGROUP_CHARGE_FAIL:
                reason = thp_unadvised.REASON if result is thp_unadvised.RESULT else ""
                self._account(BlockOutcome(address, order, result, reason))
            elif tried:
                # Go on after these have freed their old pages.
                return tried, index, True
            else:
                self._work.report.room = self._work.room.reason
                self._done(order).over_reserve += 1
        return tried, len(blocks), False

    def _try(self, blocks: list[Block], columns: PteColumns) -> None:
        """Collapse `blocks`, which have their entries in `columns`, and count the outcomes."""
        self._work.tried(sum(self._geometry.size_of(order) for _, order in blocks))
        if self._mechanism == "move":
            self._work.report.moved_blocks += len(blocks)
        begin = self._work.clock.now()
        try:
            outcomes = self._patiently(blocks, columns)
        except MthpError as error:
            # Every block is accounted for, also if the call failed as a whole: the report's counts add up to the plan.
            result = ScanResult.ANY_PROCESS if isinstance(error, TargetVanishedError) else ScanResult.FAIL
            for block in blocks:
                self._account(BlockOutcome(*block, result, error.message))
            raise
        finally:
            self.pauses_ns += take_pauses(self._work.space)
            self.seconds += [call / 1e9 for call in take_calls(self._work.space)]
        self._adapt(self._work.clock.now() - begin, len(blocks))
        if any(outcome.result is ScanResult.SUCCEED for outcome in outcomes):
            self._work.report.copied_bytes += self._beside
        if all(outcome.everywhere for outcome in outcomes):
            self._refused = outcomes[0]
        else:
            self._work.began()
        if any(outcome.reason == thp_unadvised.REASON for outcome in outcomes):
            self._admission.only_advised()
        for outcome in outcomes:
            if self._mechanism == "madvise":
                self.seconds.append(outcome.elapsed_ns / 1e9)
            if self._admission.ended_by(outcome.result):
                self._work.out_of_memory(outcome.result)
            self._account(outcome)

    def _patiently(self, blocks: list[Block], columns: PteColumns | None) -> list[BlockOutcome]:
        """Collapse `blocks`, and retry those refused for a passing reason after longer and longer rests."""
        outcomes: dict[Block, BlockOutcome] = {}
        left = blocks
        tries = 0
        for pause in (*PATIENCE, None):
            tries += 1
            outcomes |= zip(left, collapse_batch(self._work.space, left, self._means, columns), strict=True)
            columns = None  # Out of date after the first try.
            left = [block for block in left if outcomes[block].passing]
            if not left or pause is None or self._work.stop_requested():
                break
            self._work.rest(pause)
        for block in left:
            why = f"{outcomes[block].reason} (tried {tries} times)" if tries > 1 else outcomes[block].reason
            outcomes[block] = dataclasses.replace(outcomes[block], reason=why)
        return [outcomes[block] for block in blocks]

    def _in_windows(self, blocks: list[Block]) -> None:
        """Drive the machine's khugepaged over `blocks` until a window makes nothing new."""
        outcomes: list[BlockOutcome] = []
        while blocks and not self._work.stop_requested():
            self._admission.renew()
            if not self._work.room.take(0, self._geometry.pmd_size):
                self._work.report.room = self._work.room.reason
                for _, order in blocks:
                    self._done(order).over_reserve += 1
                return
            outcomes = self._work.space.collapse_blocks(blocks, self._means)
            self._work.began()
            left = []
            for outcome in outcomes:
                if outcome.result is ScanResult.SUCCEED:
                    self._account(outcome)
                elif outcome.result in _LARGE_BEFORE:
                    self._done(outcome.order).unchanged += 1
                else:
                    left.append(outcome)
            # khugepaged passed over all of it without making anything, so another window would not either.
            if len(left) == len(blocks):
                break
            blocks, outcomes = [(outcome.address, outcome.order) for outcome in left], left
        if not self._work.report.interrupted:
            for outcome in outcomes:
                self._account(outcome)

    def _account(self, outcome: BlockOutcome) -> None:
        """Count the outcome of a block."""
        report, tally, page_size = self._work.report, self._done(outcome.order), self._geometry.page_size
        report.filled_bytes += outcome.left_filled * page_size
        if outcome.result is ScanResult.SUCCEED:
            tally.made += 1
            self.made.append((outcome.address, outcome.order))
            report.copied_bytes += outcome.copied * page_size
            report.filled_bytes += outcome.filled * page_size
        else:
            tally.failed[outcome.result, outcome.reason or outcome.result.meaning] += 1

    def _done(self, order: int) -> FolioTally:
        """Return the tally of `order`, and count one block less as not tried."""
        tally = self._work.report.tally(order)
        tally.not_tried -= 1
        self._work.step(self._geometry.size_of(order), self._geometry.label(order))
        return tally

    def _adapt(self, seconds: float, blocks: int) -> None:
        """Choose the size of the next batch by the time that this one took."""
        each = max(seconds, 1e-6) / blocks
        # At most doubled, because one batch that was fast by chance must not make the next one hold up Ctrl-C.
        fitting = max(int(BATCH_SECONDS / each), min(FIRST_BATCH, int(SMALL_BATCH_SECONDS / each)))
        self._batch_size = max(1, min(fitting, 2 * self._batch_size, LARGEST_BATCH))
