"""The part of a collapse that makes folios below the PMD order: batches of blocks that the backend moves.

A batch is as large as keeps Ctrl-C from waiting long, and holds blocks of one order: the backend turns that order's
switch on for as long as the batch takes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mthp import thp_unadvised
from mthp.addrspace import Block, PteColumns, Segment
from mthp.blockstates import BlockStates, states_of
from mthp.engine.space_plan import Folios
from mthp.engine.work import Work
from mthp.errors import MthpError, TargetVanishedError
from mthp.ptes import segments_of
from mthp.results import BlockOutcome, ScanResult

FIRST_BATCH, LARGEST_BATCH = 16, 512
"""Blocks in a batch: the first time, and at most."""

LARGEST_BATCH_BYTES = 64 << 20

BATCH_SECONDS = 0.1
"""How long a batch is to take, rests included."""

SMALL_BATCH_SECONDS = 1.0
"""And one of no more than `FIRST_BATCH` blocks: to make ready for a batch takes its time too, on a slow or busy machine
more than a batch is to take, and then that time must not be spent on every single block."""

PATIENCE = (0.02, 0.1, 0.5, 2.0)
"""Seconds to wait before blocks are tried again that were refused for what passes: a thread in vfork(2) or state D.

A child of vfork(2) executes another program within milliseconds, and a disk answers within a second. What lasts longer
than all of this hardly ends while we wait.
"""


class Blocks:
    """Moves blocks.

    Args:
        folios: those to be made, all below the PMD order.

    Attributes:
        pauses_ns: how long the target stood still in each window.
    """

    def __init__(self, work: Work, folios: Folios) -> None:
        self._work = work
        self._geometry = work.space.geometry
        self._todo: dict[int, NDArray[np.uint64]] = {}
        self._batch_size = FIRST_BATCH
        self._refused: tuple[ScanResult, str] | None = None
        self._advised: list[Segment] | None = None
        self.pauses_ns: list[int] = []
        for order in work.report.folios:
            of_order = folios[folios.order == order]
            # Stable, so that what is equally full goes by ascending address.
            self._todo[order] = of_order.address[np.argsort(of_order.filled, kind="stable")]

    def carry_out(self) -> None:
        """Move them all.

        Raises:
            MthpError: it cannot go on; the report holds what was done until then.
        """
        for order, addresses in self._todo.items():
            done = 0
            while done < len(addresses):
                self._work.keep_pace()
                if self._work.told_to_stop():
                    return
                size = self._geometry.size_of(order)
                count = self._work.most_at_once(size, min(self._batch_size, max(1, LARGEST_BATCH_BYTES // size)))
                done += self._batch(addresses[done : done + count].tolist(), order)

    def _batch(self, addresses: list[int], order: int) -> int:
        """Move some blocks of one order; return how many are done with."""
        tally = self._work.report.folios[order]
        size = self._geometry.size_of(order)
        addresses, failed = self._alike(addresses)
        if failed is not None:
            tally.not_tried -= len(addresses)
            tally.failed[failed] += len(addresses)
            done = len(addresses)
        else:
            self._work.room.renew()
            blocks = [(address, order) for address in addresses]
            columns = self._work.space.read(segments_of(blocks, self._geometry.page_size))
            tried, done = self._choose(blocks, states_of(columns, blocks, self._geometry))
            tally.not_tried -= done
            if tried:
                self._move(tried, columns)
        self._work.step(size * done, self._geometry.label(order))
        return done

    def _alike(self, addresses: list[int]) -> tuple[list[int], tuple[ScanResult, str] | None]:
        """Return the first blocks that share one fate, and result and reason where these are known beforehand."""
        if self._refused is not None or self._advised is None:
            return addresses, self._refused
        spared = [thp_unadvised.lies_in(address, self._advised) for address in addresses]
        other = not spared[0]
        count = spared.index(other) if other in spared else len(spared)
        return addresses[:count], None if spared[0] else (thp_unadvised.RESULT, thp_unadvised.REASON)

    def _choose(self, blocks: Sequence[Block], before: BlockStates) -> tuple[list[Block], int]:
        """Return which of the first blocks are to be moved, and how many these are; the others are accounted for.

        They are fewer than all where no more fit into the target's memory limits at once.
        """
        order = blocks[0][1]
        tally = self._work.report.folios[order]
        size = self._geometry.size_of(order)
        tried: list[Block] = []
        fill_bytes = 0
        for index, block in enumerate(blocks):
            # Bytes of bloat if the block is filled.
            growth = size - int(before.contents[index]) * self._geometry.page_size if self._work.options.fill else 0
            if before.large[index]:
                tally.unchanged += 1
            elif before.contents[index] == 0:
                tally.failed[ScanResult.NO_PTE_TABLE, ScanResult.NO_PTE_TABLE.meaning] += 1
            elif not self._work.affords(fill_bytes + growth):
                tally.over_budget += 1
            elif not self._work.fits(size + int(before.swapped[index]) * self._geometry.page_size):
                # The new folios of a window are charged, and pages read back, before the old pages are freed.
                if tried:
                    return tried, index
                tally.over_reserve += 1
            else:
                fill_bytes += growth
                tried.append(block)
        return tried, len(blocks)

    def _move(self, blocks: list[Block], columns: PteColumns) -> None:
        """Move `blocks`, which `columns` hold, and count what came of them."""
        report, order, page_size = self._work.report, blocks[0][1], self._geometry.page_size
        tally = report.folios[order]
        self._work.tried(len(blocks) * self._geometry.size_of(order))
        report.moved_blocks += len(blocks)
        begin = time.monotonic()
        try:
            outcomes = thp_unadvised.corrected(self._work.space, blocks, self._patiently(blocks, columns))
            if any(outcome.reason == thp_unadvised.REASON for outcome in outcomes):
                self._advised = thp_unadvised.advised(self._work.space)
        except MthpError as error:
            result = ScanResult.ANY_PROCESS if isinstance(error, TargetVanishedError) else ScanResult.FAIL
            tally.failed[result, error.message] += len(blocks)
            raise
        finally:
            self.pauses_ns += self._work.space.take_pauses()
        self._adapt(time.monotonic() - begin, len(blocks))
        if all(outcome.everywhere for outcome in outcomes):
            self._refused = outcomes[0].result, outcomes[0].reason
        elif any(not outcome.everywhere for outcome in outcomes):
            self._work.began()
        for outcome in outcomes:
            self._work.tried_with(outcome.result)
            if outcome.result is ScanResult.SUCCEED:
                tally.made += 1
                report.copied_bytes += outcome.copied * page_size
                report.filled_bytes += outcome.filled * page_size
            else:
                tally.failed[outcome.result, outcome.reason or outcome.result.meaning] += 1

    def _patiently(self, blocks: list[Block], columns: PteColumns | None) -> list[BlockOutcome]:
        """Collapse `blocks`, and try those again, after longer and longer rests, that were refused for what passes."""
        outcomes: dict[Block, BlockOutcome] = {}
        left = blocks
        tries = 0
        for pause in (*PATIENCE, None):
            tries += 1
            outcomes |= zip(
                left, self._work.space.collapse_blocks(left, self._work.options.means, columns), strict=True
            )
            columns = None  # What was read before holds no more.
            left = [block for block in left if outcomes[block].passing]
            if not left or pause is None or self._work.told_to_stop():
                break
            self._work.rest(pause)
        for block in left:
            why = f"{outcomes[block].reason} (tried {tries} times)" if tries > 1 else outcomes[block].reason
            outcomes[block] = dataclasses.replace(outcomes[block], reason=why)
        return [outcomes[block] for block in blocks]

    def _adapt(self, seconds: float, blocks: int) -> None:
        """Choose the size of the next batch by the time that this one took."""
        each = max(seconds, 1e-6) / blocks
        fitting = max(int(BATCH_SECONDS / each), min(FIRST_BATCH, int(SMALL_BATCH_SECONDS / each)))
        self._batch_size = max(1, min(fitting, 2 * self._batch_size, LARGEST_BATCH))
