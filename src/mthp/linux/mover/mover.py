"""The mover of one target, ready to use: it judges blocks, sets the switches, moves, and says what came of it.

This is where the parts come together. For a batch of blocks:

1. The process is judged; what speaks against all of it is given as the reason of every block, and nothing is touched.
   It is asked again in the next batch: a thread that sleeps uninterruptibly now may not do so then.
2. Mappings and blocks are judged. What is allowed is moved order by order, the largest first; for each order the
   switches are set so that a fault brings just this one (:mod:`mthp.linux.journal`), once for the whole batch.
   Sizes below it and the PMD size may stay on: a fault takes the largest that fits, and one of the PMD size does not
   where there is a page table.
3. All threads are stopped, what may have changed is asked again (:mod:`~mthp.linux.mover.recheck`), the blocks are
   moved, window by window (:mod:`~mthp.linux.mover.session`).

The session stays open from batch to batch, since it has measured how long a window takes. It is closed with the mover,
or when the target turns out to be another program than before.

Every block has an outcome, whatever happens: if the target exits in the middle, what was done before is told, and the
rest is ANY_PROCESS.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mthp.errors import MthpError, TargetVanishedError
from mthp.linux.interruptions import suspension_held_back
from mthp.linux.journal.switches import SwitchJournal
from mthp.linux.mover.freeze import FrozenProcess
from mthp.linux.mover.outcome import Objection
from mthp.linux.mover.recheck import MAPPING_CHANGED, Before, Recheck, has_userfaultfd, last_pid, zero_pages_of
from mthp.linux.mover.refuse.block import refuse_blocks, special_ranges
from mthp.linux.mover.refuse.mapping import objection_of, refuse_vma
from mthp.linux.mover.refuse.pinned import HELD, has_large_folios, split_large_folios
from mthp.linux.mover.refuse.process import PASSING, refuse_process
from mthp.linux.mover.refuse.refusal import Refusal
from mthp.linux.mover.session import MoverSession
from mthp.linux.mover.tracee import CannotStopError
from mthp.linux.space import ProcessSpace
from mthp.means import Means
from mthp.ptes import Block, PteColumns, segments_of
from mthp.results import BlockOutcome, ScanResult
from mthp.vma import Vma

VMAS_AGE_NS = 200_000_000
"""For so long a list of mappings is good: what changes of it that matters is seen after the stop."""

VMAS_SHARE = 0.1
"""The part of the time that a target is asked for its list at most, if that takes long."""


@dataclass
class _Batch:
    """Blocks that are moved together.

    Attributes:
        blocks: all of them.
        means: what it may cost.
        last_pid: the last PID that the system had given out before the process was judged.
        outcomes: of the blocks that have one.
    """

    blocks: Sequence[Block]
    means: Means
    last_pid: int
    outcomes: dict[Block, BlockOutcome] = field(default_factory=dict)

    @property
    def open(self) -> list[Block]:
        """Those without an outcome, in their order."""
        return [block for block in self.blocks if block not in self.outcomes]

    @property
    def done(self) -> bool:
        """Whether a block was moved."""
        return any(outcome.result is ScanResult.SUCCEED for outcome in self.outcomes.values())

    def reopen(self, reason: str) -> bool:
        """Take their outcomes from the blocks that were left for `reason`; give whether there are any."""
        again = [block for block, outcome in self.outcomes.items() if outcome.reason == reason]
        for block in again:
            del self.outcomes[block]
        return bool(again)

    def give_up(self, blocks: Sequence[Block], result: ScanResult, error: MthpError) -> None:
        """Give those of `blocks` without an outcome this one."""
        reason = f"{error.message} ({error.help})" if error.help else error.message
        passing = isinstance(error, CannotStopError)
        for block in blocks:
            outcome = BlockOutcome(*block, result, reason, everywhere=True, passing=passing)
            self.outcomes.setdefault(block, outcome)


class Mover:
    """Moves blocks of one process to folios of their orders.

    Args:
        space: the target.
        journal: sets the machine's switches; the one in the usual place if not given.
    """

    def __init__(self, space: ProcessSpace, *, journal: SwitchJournal | None = None) -> None:
        self._space = space
        self._process = space.process
        self._geometry = space.geometry
        self._journal = journal or SwitchJournal(sysfs=space.sysfs)
        self._session: MoverSession | None = None
        self._recheck = Recheck(space.process, space.geometry)
        self._broken = ""
        self._before: Before | None = None
        self._vmas: list[Vma] = []
        self._vmas_good_until = 0
        self._pauses: list[int] = []

    def refusals(self, means: Means) -> list[Refusal]:
        """Return all that speaks against moving memory of the process by `means` at this moment.

        Raises:
            TargetVanishedError: it is gone.
        """
        return refuse_process(self._process, self._space, means)

    def collapse(self, blocks: Sequence[Block], means: Means, before: PteColumns) -> list[BlockOutcome]:
        """Move `blocks`, disjoint and below the PMD order: the outcome of each, in their order.

        Args:
            before: the entries of the blocks, as just read.

        Raises:
            TargetVanishedError: the process was gone before anything was moved.
            NotPermittedError, UnsupportedError, MthpError: nothing was moved, since the switches cannot be set.
        """
        batch = _Batch(blocks, means, last_pid())
        refusals = [] if self._broken else self.refusals(means)
        if reason := self._broken or "; ".join(why.reason for why in refusals):
            passing = bool(refusals) and all(why.key in PASSING for why in refusals)
            return [BlockOutcome(*block, ScanResult.FAIL, reason, everywhere=True, passing=passing) for block in blocks]
        with suspension_held_back():
            self._collapse(batch, before)
            if batch.reopen(MAPPING_CHANGED.reason):
                # The list of mappings that they were judged by was too old.
                self._vmas_good_until = 0
                self._collapse(batch, self._space.read(segments_of(batch.open, self._geometry.page_size)))
        return [batch.outcomes[block] for block in blocks]

    def _collapse(self, batch: _Batch, before: PteColumns) -> None:
        """Judge the blocks that have no outcome yet, and move them, the largest first."""
        self._judge(batch, before)
        for order in sorted({order for _, order in batch.open}, reverse=True):
            blocks = [block for block in batch.open if block[1] == order]
            try:
                # A fault takes the largest size that fits: the PMD size never does, with a page table there.
                with self._journal.only(order, off=range(order + 1, self._geometry.pmd_order)):
                    self._move(blocks, batch)
            except MthpError as error:
                if not batch.done:
                    raise
                batch.give_up(blocks, ScanResult.FAIL, error)

    def _judge(self, batch: _Batch, columns: PteColumns) -> None:
        """Give those blocks their outcome that are not to be moved; remember what the others were judged by."""
        blocks = batch.open
        uffd = has_userfaultfd(self._process)
        vmas = self._mappings()
        addresses = np.array([address for address, _ in blocks], np.int64)
        orders = np.array([order for _, order in blocks], np.int8)
        verdicts = refuse_blocks(
            columns,
            None if columns.pfn is None else self._space.mapcounts(columns),
            addresses,
            orders,
            vmas=vmas,
            refuse_vma=refuse_vma,
            special=special_ranges(self._process),
            page_size=self._geometry.page_size,
            fill=batch.means.fill,
        )
        for block, verdict in zip(blocks, verdicts.tolist(), strict=True):
            if verdict:
                result, reason = objection_of(verdict, vmas, block[0])
                batch.outcomes[block] = BlockOutcome(*block, result, reason)
        if batch.open and has_large_folios(columns):
            for block in split_large_folios(self._space, sorted(batch.open)):
                batch.outcomes[block] = BlockOutcome(*block, *HELD)
        self._before = Before(vmas, zero_pages_of(columns), batch.last_pid, uffd, batch.means.fill)

    def _mappings(self) -> list[Vma]:
        """The mappings, not older than need be. Writing the list takes the kernel a walk over all page tables."""
        now = time.monotonic_ns()
        if now > self._vmas_good_until:
            self._vmas = self._space.vmas()
            taken = time.monotonic_ns() - now
            self._vmas_good_until = now + taken + max(VMAS_AGE_NS, int(taken / VMAS_SHARE))
        return self._vmas

    def _judge_again(self, frozen: FrozenProcess, blocks: Sequence[Block]) -> list[Objection | None]:
        """As :meth:`_judge`, now that all threads stand still."""
        assert self._before is not None
        return self._recheck.objections(frozen, blocks, self._before)

    def _move(self, blocks: Sequence[Block], batch: _Batch) -> None:
        """Move blocks, all of one order."""
        try:
            # Populating first makes pages this process's own again that a child which has exited had shared. It fills
            # no hole that is not to be filled: after the stop such blocks are refused.
            for done in self._opened(batch.means).windows(blocks, verify=batch.means.verify, fill=True):
                batch.outcomes |= {(outcome.address, outcome.order): outcome for outcome in done}
                if any(outcome.verified is False for outcome in done):
                    self._broken = "bytes of another block are not what they were before: end the target"
                    raise MthpError(self._broken)
        except TargetVanishedError as error:
            self._drop_session()
            batch.give_up(blocks, ScanResult.ANY_PROCESS, error)
        except MthpError as error:
            self._drop_session()
            batch.give_up(blocks, ScanResult.FAIL, error)
        finally:
            self._note_pauses()

    def _opened(self, means: Means) -> MoverSession:
        """The session, opened if it is not."""
        if self._session is None:
            session = MoverSession(
                self._process,
                self._geometry,
                max_pause_ns=means.max_pause_ns,
                duty=means.duty,
                recheck=self._judge_again,
            )
            session.__enter__()
            self._session = session
        self._session.limit(means.max_pause_ns, means.duty)
        return self._session

    def take_pauses(self) -> list[int]:
        """How long each window was, in nanoseconds, since this was last asked."""
        pauses, self._pauses = self._pauses, []
        return pauses

    def _note_pauses(self) -> None:
        if self._session is not None:
            self._pauses += [pause.total_ns for pause in self._session.pauses]
            self._session.pauses.clear()

    def _drop_session(self) -> None:
        self._note_pauses()
        if self._session is not None:
            session, self._session = self._session, None
            session.close()

    def close(self) -> None:
        """Close what is open; there is nothing in the target. Closing twice does nothing."""
        self._drop_session()
        self._recheck.close()
