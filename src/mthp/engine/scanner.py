"""khugepaged: its list of address spaces (mm_slots), its cursor, and its pace.

Follows khugepaged_do_scan(), collapse_scan_mm_slot() and khugepaged_wait_work() (mm/khugepaged.c). A pass scans
``pages_to_scan`` entries and then rests for ``scan_sleep_millisecs``; the cursor (address space, address) stays between
passes. It visits the address spaces in the order in which they were added, and counts a full scan after the last. When
memory cannot be allocated it rests for ``alloc_sleep_millisecs``, and the second time in a pass ends the pass.

:class:`Scanner` does this for every :class:`~mthp.engine.visited.VisitedSpace`. The simulated machine's khugepaged is
one, and so is :class:`mthp.Khugepaged`, which visits any address space.
"""

from __future__ import annotations

import enum
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mthp.engine.visited import Passage, RestClock, VisitedSpace, WallClock
from mthp.errors import MthpError, TargetVanishedError
from mthp.results import ScanResult
from mthp.tunables import Tunables

POLL = 0.5
"""Seconds between two calls of a caller's `stop` while resting."""

_MILLISECOND = 1e-3


class PassEnd(enum.Enum):
    """Why a pass ended."""

    BUDGET = "pages_to_scan entries were scanned"
    ROUND = "every address space was visited"
    ALLOC = "memory could not be allocated, for the second time in the pass"
    STOPPED = "the caller stopped it"
    IDLE = "there is no address space to visit"


@dataclass
class Statistics:
    """Counts since the start.

    Attributes:
        passes: calls of :meth:`Scanner.do_scan`.
        progress: entries scanned, as the budget counts them.
        ranges: PMD ranges scanned.
        results: PMD ranges by scan result.
        attempts: attempts by (order, result).
        copied, filled: pages that collapses copied, and PTEs that they filled, by order.
        alloc_sleeps: rests because memory could not be allocated.
    """

    passes: int = 0
    progress: int = 0
    ranges: int = 0
    results: Counter[ScanResult] = field(default_factory=Counter)
    attempts: Counter[tuple[int, ScanResult]] = field(default_factory=Counter)
    copied: Counter[int] = field(default_factory=Counter)
    filled: Counter[int] = field(default_factory=Counter)
    alloc_sleeps: int = 0

    def add(self, passage: Passage) -> None:
        """Add the results of some ranges."""
        self.progress += passage.progress
        self.ranges += len(passage.results)
        for index, count in enumerate(np.bincount(passage.results).tolist()):
            if count:
                self.results[ScanResult(index)] += count
        for attempt in passage.attempts:
            self.attempts[attempt.order, attempt.result] += 1
            if attempt.result is ScanResult.SUCCEED:
                self.copied[attempt.order] += attempt.copied
                self.filled[attempt.order] += attempt.filled


Listener = Callable[[VisitedSpace, Passage], None]
"""Called with every :class:`~mthp.engine.visited.Passage`: ranges scanned, and the attempts made in them."""


class Scanner:
    """The address spaces that are visited, the cursor, and the pace.

    One thread scans. Other threads may add and remove address spaces meanwhile, and wake or stop it.

    Args:
        tunables: called at the start of each pass and of each rest.
        listener: called with all that was scanned.

    Attributes:
        full_scans: times that the cursor went past the last address space.
        pages_collapsed: PMD ranges in which something was collapsed.
        statistics: counts since the start.
        address: the cursor's address in the present address space.
    """

    def __init__(
        self, tunables: Callable[[], Tunables], clock: RestClock | None = None, listener: Listener | None = None
    ) -> None:
        self._tunables = tunables
        self._clock = clock or WallClock()
        self._listener = listener
        self._slots: list[VisitedSpace] = []
        self._current: VisitedSpace | None = None
        self._scanning = False
        self._unwanted: set[int] = set()
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._stopping = False
        self._progress = self._budget = 0
        self.address = 0
        self.full_scans = 0
        self.pages_collapsed = 0
        self.statistics = Statistics()

    # The address spaces.

    @property
    def slots(self) -> tuple[VisitedSpace, ...]:
        """The address spaces that are visited, in order."""
        with self._lock:
            return tuple(self._slots)

    @property
    def current(self) -> VisitedSpace | None:
        """The address space of the cursor; None between full scans."""
        return self._current

    def add(self, space: VisitedSpace) -> None:
        """Visit `space` from now on, after all others (__khugepaged_enter(), mm/khugepaged.c)."""
        with self._lock:
            if any(slot is space for slot in self._slots):
                return
            self._slots.append(space)
            if len(self._slots) == 1:
                self.wake()

    def remove(self, space: VisitedSpace) -> None:
        """Stop visiting `space` (__khugepaged_exit(), mm/khugepaged.c), after the scan of it that may be running."""
        with self._lock:
            if not any(slot is space for slot in self._slots):
                return
            # The scanning thread uses the space now. It drops the space itself when its scan is over.
            if space is self._current and self._scanning:
                self._unwanted.add(id(space))
            elif space is self._current:
                self._leave(space, gone=True)
            else:
                self._drop(space)

    def _drop(self, space: VisitedSpace) -> None:
        self._slots = [slot for slot in self._slots if slot is not space]
        self._unwanted.discard(id(space))
        space.close()

    # One pass.

    def do_scan(self) -> PassEnd:
        """Make one pass (khugepaged_do_scan()), and return why it ended.

        Raises:
            MthpError: an address space failed for another reason than that it vanished. It is not visited any more. All
                else is in order, and the next pass goes on with the address space behind it.
        """
        self._begin_pass()
        self.statistics.passes += 1
        self._progress, self._budget = 0, self._tunables().pages_to_scan
        rounds, waited = 0, False
        while self._progress < self._budget:
            if self._stopping:
                return PassEnd.STOPPED
            with self._lock:
                if not self._slots:
                    return PassEnd.ROUND if self._progress else PassEnd.IDLE
                # The second time that the cursor starts from the first space ends the pass, so an idle machine is not
                # scanned in a circle until the budget is spent.
                rounds += self._current is None
                if rounds >= 2:
                    return PassEnd.ROUND
                if self._current is None:
                    self._current, self.address = self._slots[0], 0
                slot, self._scanning = self._current, True
            try:
                result = self._visit(slot)
            finally:
                with self._lock:
                    self._scanning = False
                    if id(slot) in self._unwanted:
                        self._leave(slot, gone=True)
            if result is ScanResult.ALLOC_HUGE_PAGE_FAIL and self._progress < self._budget:
                if waited:
                    return PassEnd.ALLOC
                waited = True
                self.statistics.alloc_sleeps += 1
                self._rest(self._tunables().alloc_sleep_millisecs * _MILLISECOND)
        return PassEnd.BUDGET

    def full_scan(self) -> None:
        """Make passes, without rests between them, until every address space from the cursor on was visited."""
        before = self.full_scans
        while self._slots and self.full_scans == before and self.do_scan() is not PassEnd.STOPPED:
            pass

    def _visit(self, slot: VisitedSpace) -> ScanResult:
        """Go on in an address space until a collapse was tried, the budget is spent, or the end is reached."""
        # Entering an address space counts as one entry, also if it has nothing to scan.
        self._count_progress(1)
        result, gone = ScanResult.FAIL, False
        try:
            while not (slot.exiting or slot.thp_disabled or id(slot) in self._unwanted or self._stopping):
                found = slot.find(self.address)
                self._count_progress(found.passed)
                if found.stretch is None:
                    break
                passage = slot.scan(found.stretch, max(1, self._budget - self._progress))
                self.address = passage.end
                self._progress += passage.progress
                self._account(slot, passage)
                result = passage.result
                # After a collapse the mappings may have changed, so the kernel looks the cursor's address up again.
                if passage.released or self._progress >= self._budget:
                    return result
            gone = slot.exiting
        except TargetVanishedError:
            gone = True
        except MthpError:
            with self._lock:
                self._leave(slot, gone=True)
            raise
        with self._lock:
            # An unwanted address space is left when the scan is over.
            if id(slot) not in self._unwanted and (gone or not self._stopping):
                self._leave(slot, gone=gone)
        return result

    def _count_progress(self, entries: int) -> None:
        self._progress += entries
        self.statistics.progress += entries

    def _account(self, slot: VisitedSpace, passage: Passage) -> None:
        self.statistics.add(passage)
        if collapsed := self._collapsed(passage):
            self._count("pages_collapsed", collapsed)
        if self._listener is not None:
            self._listener(slot, passage)

    def _collapsed(self, passage: Passage) -> int:
        """Return the number of PMD ranges that count as collapsed."""
        return int(np.count_nonzero(passage.results == ScanResult.SUCCEED))

    def _leave(self, slot: VisitedSpace, *, gone: bool) -> None:
        """Move the cursor on to the next address space, and drop this one if it is gone."""
        at = next(index for index, each in enumerate(self._slots) if each is slot)
        self._current, self.address = (self._slots[at + 1] if at + 1 < len(self._slots) else None), 0
        if self._current is None:
            self._count("full_scans", 1)
        if gone:
            self._drop(slot)

    def _count(self, name: str, by: int) -> None:
        """Add to the attribute that has the kernel's name of the counter."""
        setattr(self, name, getattr(self, name) + by)

    def _begin_pass(self) -> None:
        """Do the machine's work before a pass: lru_add_drain_all() (mm/swap.c)."""

    # The pace.

    def run(self, stop: Callable[[], bool] | None = None) -> None:
        """Scan and rest in turn (khugepaged()), until :meth:`stop` is called or `stop` returns True.

        Args:
            stop: called between passes, and twice a second while resting.

        Raises:
            MthpError: as :meth:`do_scan`; :meth:`run` may then be called again.
        """
        try:
            while not self._stop_requested(stop):
                self._wake.clear()
                self.do_scan()
                # Without address spaces it waits until one is added.
                seconds = self._tunables().scan_sleep_millisecs * _MILLISECOND if self._slots else float("inf")
                self._wait(seconds, stop)
        finally:
            self._stopping = False

    def stop(self) -> None:
        """End :meth:`run` and the present pass, after the ranges at hand; callable from any thread.

        If :meth:`run` has not begun yet, it ends at once.
        """
        self._stopping = True
        self._wake.set()

    def wake(self) -> None:
        """Cut a rest short; callable from any thread."""
        self._wake.set()

    def _stop_requested(self, stop: Callable[[], bool] | None) -> bool:
        if stop is not None and stop():
            self._stopping = True
        return self._stopping

    def _wait(self, seconds: float, stop: Callable[[], bool] | None) -> None:
        """Rest for `seconds`, unless woken or stopped."""
        end = self._clock.now() + seconds
        while not self._stop_requested(stop) and not self._wake.is_set() and (left := end - self._clock.now()) > 0:
            self._clock.sleep(min(left, POLL) if stop is not None or left == float("inf") else left, self._wake)

    def _rest(self, seconds: float) -> None:
        """Rest within a pass."""
        self._wake.clear()
        # stop() sets this before it wakes, so a stop is not missed.
        if not self._stopping:
            self._clock.sleep(seconds, self._wake)
