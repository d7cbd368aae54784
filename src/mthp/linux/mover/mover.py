"""Move blocks of a process: check, switch, move, verify. The loop is the same for another process and for this one.

1. *Check* the process, then the mappings and blocks (:mod:`mthp.linux.mover.refuse`). A refusal of the process refuses
   every block.
2. *Switch*, order by order: set the machine's switches so that a fault brings a folio of just this order
   (:mod:`mthp.linux.journal`).
3. *Move*, window by window. A :class:`~mthp.linux.mover.hold.Hold` keeps every other user of the blocks away while they
   are moved. Only the hold differs: another process is stopped, checked again and made to run a stub
   (:mod:`~mthp.linux.mover.session`); in this process a userfaultfd blocks threads that touch a block
   (:mod:`~mthp.linux.mover.guarded`).
4. *Verify*: after wrong bytes nothing of this process is moved any more.

Every block has an outcome, whatever happens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mthp.closing import Closing
from mthp.errors import MthpError, TargetVanishedError
from mthp.linux import procfs
from mthp.linux.interruptions import suspension_held_back
from mthp.linux.journal.switches import SwitchJournal
from mthp.linux.mover.guarded import BlockGuard
from mthp.linux.mover.hold import Hold
from mthp.linux.mover.movetarget import MoveTarget
from mthp.linux.mover.outcome import LostBytesError
from mthp.linux.mover.recheck import MAPPING_CHANGED, Before, has_userfaultfd, zero_pages_of
from mthp.linux.mover.refuse.block import objection_of, refuse_blocks, special_ranges
from mthp.linux.mover.refuse.pinned import HELD, has_large_folios, split_large_folios
from mthp.linux.mover.refuse.process import PASSING, refuse_process
from mthp.linux.mover.refuse.sharing import last_pid
from mthp.linux.mover.session import MoverSession
from mthp.linux.mover.tracee import CannotStopError
from mthp.means import Means
from mthp.movechecks import Refusal
from mthp.ptes import Block, PteColumns, segments_of
from mthp.results import BlockOutcome, ScanResult
from mthp.vma import Vma

VMAS_AGE_NS = 200_000_000
"""Nanoseconds for which a list of mappings is used by a hold that notices later changes."""

VMAS_SHARE = 0.1
"""The share of the time that reading the list may take, where reading takes long."""


def hold_of(target: MoveTarget, *, guarded: bool = True) -> Hold:
    """Return the hold for the memory of `target`; `guarded`: whether other threads may use memory of this process."""
    if target.process.is_self:
        return BlockGuard(target.geometry, guarded=guarded)
    return MoverSession(target.process, target.geometry)


@dataclass
class _Batch:
    """Blocks that are moved together.

    Attributes:
        last_pid: the last PID that the system had given out before the process was checked.
    """

    blocks: Sequence[Block]
    means: Means
    last_pid: int
    outcomes: dict[Block, BlockOutcome] = field(default_factory=dict)

    @property
    def open(self) -> list[Block]:
        return [block for block in self.blocks if block not in self.outcomes]

    @property
    def done(self) -> bool:
        return any(outcome.result is ScanResult.SUCCEED for outcome in self.outcomes.values())

    def reopen(self, reason: str) -> bool:
        """Remove the outcomes with `reason`; return whether there were any."""
        again = [block for block, outcome in self.outcomes.items() if outcome.reason == reason]
        for block in again:
            del self.outcomes[block]
        return bool(again)

    def give_up(self, blocks: Sequence[Block], error: MthpError) -> None:
        """Set the outcome for `error` for those of `blocks` without one."""
        # The target may exit in the middle: the blocks done before keep their outcomes.
        result = ScanResult.ANY_PROCESS if isinstance(error, TargetVanishedError) else ScanResult.FAIL
        reason = f"{error.message} ({error.help})" if error.help else error.message
        passing = isinstance(error, CannotStopError)
        for block in blocks:
            outcome = BlockOutcome(*block, result, reason, everywhere=True, passing=passing)
            self.outcomes.setdefault(block, outcome)


class Mover(Closing):
    """A mover of blocks of one process to folios of their orders."""

    def __init__(self, target: MoveTarget, hold: Hold, journal: SwitchJournal) -> None:
        self._target = target
        self._process = target.process
        self._geometry = target.geometry
        self._hold = hold
        self._journal = journal
        self._lost: LostBytesError | None = None
        self._vmas: list[Vma] = []
        self._vmas_good_until = 0

    def refusals(self, means: Means) -> list[Refusal]:
        """Return the refusals of the process for `means` at this moment."""
        found = refuse_process(self._process, self._geometry, means)
        return [refusal for refusal in found if refusal.key not in self._hold.waived]

    def collapse(self, blocks: Sequence[Block], means: Means, before: PteColumns) -> list[BlockOutcome]:
        """Move `blocks`, disjoint and below the PMD order; return the outcome of each, in their order.

        Args:
            before: the entries of the blocks, just read.

        Raises:
            TargetVanishedError: the process exited before anything was moved.
            NotPermittedError, UnsupportedError, MthpError: nothing was moved: the switches cannot be set, or this
                process cannot move its own memory.
        """
        # Before the checks: a process that starts during them has a larger PID, and is compared after the stop.
        batch = _Batch(blocks, means, last_pid())
        if self._lost:
            batch.give_up(blocks, self._lost)
            return [batch.outcomes[block] for block in blocks]
        refusals = self.refusals(means)
        self._hold.admit(means, refusals)
        # Remembered for this batch only: a thread in uninterruptible sleep, for example, wakes up.
        if refusals:
            reason = "; ".join(why.reason for why in refusals)
            passing = all(why.key in PASSING for why in refusals)
            return [BlockOutcome(*block, ScanResult.FAIL, reason, everywhere=True, passing=passing) for block in blocks]
        # Ctrl-Z in here would leave the target stopped and the switches changed until the user types `fg`.
        with suspension_held_back():
            self._collapse(batch, before)
            if batch.reopen(MAPPING_CHANGED.reason):
                # The list of mappings used for the check was too old.
                self._vmas_good_until = 0
                self._collapse(batch, self._target.read(segments_of(batch.open, self._geometry.page_size)))
        return [batch.outcomes[block] for block in blocks]

    def _collapse(self, batch: _Batch, entries: PteColumns) -> None:
        """Check the blocks that have no outcome yet, and move them, the largest first."""
        before = self._check(batch, entries)
        for order in sorted({order for _, order in batch.open}, reverse=True):
            blocks = [block for block in batch.open if block[1] == order]
            if self._lost:
                batch.give_up(blocks, self._lost)
                continue
            try:
                # Smaller sizes may stay on: a fault takes the largest enabled size whose aligned range is empty and in
                # the mapping (alloc_anon_folio, mm/memory.c). If memory is short, a smaller one comes: the bytes are
                # right, and the page tables show the order afterwards.
                with self._journal.only(order, off=self._hold.too_large(order)), self._hold.ready(order):
                    self._move(blocks, batch, before)
            except MthpError as error:
                # Nothing was moved, so the caller gets the error itself; blocks that were moved must be reported.
                if not batch.done:
                    raise
                batch.give_up(blocks, error)

    def _check(self, batch: _Batch, entries: PteColumns) -> Before:
        """Record the outcomes of refused blocks; return the data that the other blocks were checked by."""
        blocks = batch.open
        # Before the mappings are read: without a userfaultfd now and after the stop, none was registered between.
        uffd = has_userfaultfd(self._process)
        vmas = self._mappings()
        verdicts = refuse_blocks(
            entries,
            # Frame numbers take CAP_SYS_ADMIN (pagemap_open, fs/proc/task_mmu.c).
            None if entries.pfn is None else self._target.mapcounts(entries),
            np.array([address for address, _ in blocks], np.int64),
            np.array([order for _, order in blocks], np.int8),
            vmas=vmas,
            special=self._hold.around(special_ranges(self._process)),
            page_size=self._geometry.page_size,
            fill=batch.means.fill,
        )
        for block, verdict in zip(blocks, verdicts.tolist(), strict=True):
            if verdict:
                batch.outcomes[block] = BlockOutcome(*block, *objection_of(verdict, vmas, block[0]))
        if batch.open and has_large_folios(entries):
            # Last, because splitting changes the target's memory: only blocks that nothing else refuses are split.
            for block in split_large_folios(self._target, sorted(batch.open)):
                batch.outcomes[block] = BlockOutcome(*block, *HELD)
        return Before(vmas, zero_pages_of(entries), batch.last_pid, uffd, batch.means.fill)

    def _mappings(self) -> list[Vma]:
        """Return the mappings, cached for a moment, because the kernel walks all page tables to write the list."""
        now = time.monotonic_ns()
        if now > self._vmas_good_until or not self._hold.checks_again:
            self._vmas = procfs.read_vmas(self._process)
            taken = time.monotonic_ns() - now
            self._vmas_good_until = now + taken + max(VMAS_AGE_NS, int(taken / VMAS_SHARE))
        return self._vmas

    def _move(self, blocks: Sequence[Block], batch: _Batch, before: Before) -> None:
        """Move blocks, all of one order, and check their bytes."""
        try:
            for done in self._hold.windows(blocks, batch.means, before):
                batch.outcomes |= {(outcome.address, outcome.order): outcome for outcome in done}
                # The cause is unknown, so any further move could destroy more.
                if any(outcome.verified is False for outcome in done):
                    raise LostBytesError("bytes of another block changed: end the target")
        except MthpError as error:
            if isinstance(error, LostBytesError):
                self._lost = error
            batch.give_up(blocks, error)

    def take_pauses(self) -> list[int]:
        """Return the lengths of the windows since the last call, in nanoseconds."""
        return self._hold.take_pauses()

    def close(self) -> None:
        """Close what is open; the target contains nothing to remove. Closing twice does nothing."""
        self._hold.close()
