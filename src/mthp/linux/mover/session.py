"""Hold the memory of another process: stop all its threads and have one of them move the blocks.

A window in the order in which it happens is :meth:`MoverSession._stop_and_move`: stop (freeze), check again (recheck),
bring the stub in (inject), park all threads and let one of them work (park), let all go (freeze).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from mthp.closing import Closing
from mthp.errors import MthpError, TargetVanishedError, UnsupportedError, UsageError
from mthp.geometry import Geometry
from mthp.linux.mover import stub
from mthp.linux.mover.arch import native
from mthp.linux.mover.arch.machine import Machine
from mthp.linux.mover.arch.x86_64 import has_protection_keys
from mthp.linux.mover.freeze import STOP_TIMEOUT_NS, FrozenProcess
from mthp.linux.mover.inject import Injection, Place, inject
from mthp.linux.mover.outcome import Objection
from mthp.linux.mover.park import park, special_ranges, work
from mthp.linux.mover.pause import Pause, PauseBudget, rest_seconds
from mthp.linux.mover.recheck import Before, Recheck
from mthp.linux.mover.refuse.block import BlockRefusal, SpecialRanges, touches
from mthp.linux.mover.runs import operations_of, outcomes_of, run_lengths, taken
from mthp.linux.mover.steps import Step, report
from mthp.linux.mover.taskfiles import read_threads
from mthp.linux.mover.tracee import Stopped, check_threads
from mthp.linux.process import Process
from mthp.means import MAX_PAUSE_NS, PAUSE_SHARE, Means
from mthp.movechecks import Refusal
from mthp.ptes import Block
from mthp.results import BlockOutcome

_PR_SET_TIMERSLACK = 29
_T = TypeVar("_T")
_libc = ctypes.CDLL(None, use_errno=True)


def in_tracing_thread(deed: Callable[[], _T]) -> _T:
    """Run `deed` in a new thread, and return its result.

    A tracer is a thread. The end of this one lets go of whatever is still traced, also of threads that never stopped
    and so could not be detached. And signal handlers of Python, KeyboardInterrupt among them, run in the main thread
    only, so nothing interrupts a window: leaving the ``with`` block waits for its end. An interruption that comes while
    the thread is being started may leave it unknown to the executor, so it begins only when it is told to.
    """
    begin: SimpleQueue[bool] = SimpleQueue()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="mthp-mover", initializer=_hurry) as executor:
        try:
            future = executor.submit(lambda: deed() if begin.get() else None)
            begin.put(True)
            return cast("_T", future.result())
        except BaseException:
            begin.put(False)  # read by nobody if it was told to begin
            raise


def _hurry() -> None:
    """Have this thread, which ends soon, run before the target's threads and sleep no longer than it asks for."""
    _libc.prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1), 0, 0, 0)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


MAX_BLOCKS = 512
"""Blocks in one window at most."""

CheckAgain = Callable[[FrozenProcess, Sequence[Block]], Sequence[Objection | None]]
"""Called when all threads stand still: gives for each block why it must not be moved after all, or None."""

_Int64s = NDArray[np.int64]


@contextlib.contextmanager
def all_stopped(
    process: Process,
    timeout_ns: int = STOP_TIMEOUT_NS,
    machine: Machine | None = None,
    like: Stopped | None = None,
) -> Iterator[FrozenProcess]:
    """Yield `process`, every thread of it standing still; all are released afterwards.

    Raises:
        CannotStopError, NotPermittedError: as :meth:`FrozenProcess.stop`.
    """
    known = check_threads(process, read_threads(process))
    frozen = FrozenProcess(process, timeout_ns, machine, like)
    try:
        frozen.stop(known)
        report(Step.STOPPED)
        yield frozen
    except OSError as error:
        if error.errno != errno.ESRCH:
            raise
        raise TargetVanishedError(f"process {process.label} was killed") from error
    finally:
        frozen.release()


class MoverSession(Closing):
    """Moves blocks of one process to new folios (:class:`~mthp.linux.mover.mover.Hold`).

    Between two windows nothing of it is in the target, and what it keeps are measurements.

    The caller has enabled exactly one folio size for the time of :meth:`move`, and has refused what must be refused
    (:mod:`mthp.linux.mover.refuse`). If the target is a child of this process, nobody else in it may wait for that
    child meanwhile: wait(2) would report the stops of a tracee to whoever asks first.

    Args:
        process: the target; it stays the caller's.
        max_pause_ns: how long a pause may be, in nanoseconds; measured, and adapted to.
        duty: the part of the time that the target may stand still, above 0, up to 1.
        stop_timeout_ns: how long threads may take to stop before they are let go.
        recheck: asked again for every block once all threads stand still.

    Attributes:
        pauses: every window in which blocks were moved; whoever keeps a session for long may empty the list.

    Raises:
        UnsupportedError: no stub for this machine, or the target is this process.
        UsageError: `max_pause_ns` or `duty` out of range.
    """

    waived: frozenset[str] = frozenset()
    checks_again = True

    def __init__(
        self,
        process: Process,
        geometry: Geometry,
        *,
        max_pause_ns: int = MAX_PAUSE_NS,
        duty: float = PAUSE_SHARE,
        stop_timeout_ns: int = STOP_TIMEOUT_NS,
        recheck: CheckAgain | None = None,
    ) -> None:
        if process.is_self:
            raise UnsupportedError("a process cannot trace itself", help="use mthp.collapse_self")
        self.pauses: list[Pause] = []
        self._machine = native()
        self._threads: Stopped | None = None
        self._process = process
        self._geometry = geometry
        self._stop_timeout_ns = stop_timeout_ns
        self._check_again = recheck
        self._recheck: Recheck | None = None
        self._budget = PauseBudget(max_pause_ns, MAX_BLOCKS)
        self.limit(max_pause_ns, duty)
        self._place: Place | None = None
        # A protection key may bar the worker, one thread of the target with its rights, from another one's memory.
        # Populating finds out with an error where the copying would fault.
        self._populate_first = has_protection_keys()

    def limit(self, max_pause_ns: int, duty: float) -> None:
        """From now on keep pauses to `max_pause_ns`, and to the part `duty` of the time.

        Raises:
            UsageError: out of range.
        """
        if max_pause_ns <= 0:
            raise UsageError(f"a pause of {max_pause_ns} ns is not above 0")
        if not 0 < duty <= 1:
            raise UsageError(f"a duty of {duty} is not above 0 and at most 1")
        self._duty = duty
        self._budget.limit(max_pause_ns)

    def admit(self, means: Means, refusals: Sequence[Refusal]) -> None:
        """Do nothing: what speaks against another process is the outcome of its blocks."""

    def too_large(self, order: int) -> range:
        """Return all larger orders but the PMD's, whose folios do not fit where there is a page table."""
        return range(order + 1, self._geometry.pmd_order)

    def around(self, special: SpecialRanges) -> SpecialRanges:
        """Return `special`: what changes until the stop is noticed after it."""
        return special

    def ready(self, _order: int) -> contextlib.nullcontext[None]:
        """Return nothing to be opened."""
        return contextlib.nullcontext()

    def windows(self, blocks: Sequence[Block], means: Means, before: Before) -> Iterator[list[BlockOutcome]]:
        """As :meth:`move`, window by window: the outcomes of each, before the next is opened, in any order.

        Args:
            before: what the blocks were checked by; it is checked again after the stop.

        Raises:
            CannotStopError, TargetVanishedError: as :meth:`move`.
        """
        self.limit(means.max_pause_ns, means.pause_share)
        self._recheck = self._recheck or Recheck(self._process, self._geometry)
        self._check_again = functools.partial(self._recheck.objections, before=before)
        # Populating first makes pages this process's own again that a child which has exited had shared. It fills no
        # hole that is not to be filled: after the stop such blocks are refused.
        return self._windows(blocks, verify=means.verify, fill=True)

    def take_pauses(self) -> list[int]:
        """Return how long each window was, in nanoseconds, since the last call."""
        pauses, self.pauses = self.pauses, []
        return [pause.total_ns for pause in pauses]

    def close(self) -> None:
        """Close what is open. Closing twice does nothing."""
        if self._recheck:
            self._recheck.close()
            self._recheck = None

    def move(self, blocks: Sequence[Block], *, verify: bool = False, fill: bool = False) -> list[BlockOutcome]:
        """Move each block to new memory, which is one folio of its order if the machine's switches make it so.

        An outcome says whether the bytes lie in new memory, and in `copied` how many pages were moved; of what order
        their folios are, the page tables show.

        Args:
            blocks: (address, order) of each; aligned, distinct.
            verify: compare a hash of the bytes before and after, inside the window.
            fill: populate absent pages first.

        Returns:
            The outcome of each block, in their order.

        Raises:
            UsageError: a block is not aligned, or of an order that does not exist or is the PMD order.
            CannotStopError: the target does not stop.
        """
        windows = self._windows(blocks, verify=verify, fill=fill)
        outcomes = {(outcome.address, outcome.order): outcome for done in windows for outcome in done}
        return [outcomes[block] for block in blocks]

    def _windows(self, blocks: Sequence[Block], *, verify: bool, fill: bool) -> Iterator[list[BlockOutcome]]:
        """Open one window after the other, with a rest between them; blocks that failed in a run get one alone."""
        for address, order in blocks:
            if order == self._geometry.pmd_order:
                # The page table stays when its pages are moved away, and with it there is no PMD fault.
                raise UsageError(
                    f"the mover makes no folios of {self._geometry.label(order)}", help="MADV_COLLAPSE does"
                )
            if address % self._geometry.size_of(self._geometry.check_order(order)):
                raise UsageError(f"{address:#x} is not aligned to {self._geometry.label(order)}")
        flags = (stub.FLAG_VERIFY if verify else 0) | (stub.FLAG_FILL if fill or self._populate_first else 0)
        count = 0
        left: list[Block] = []
        while left or count < len(blocks):
            ahead = left or blocks[count : count + MAX_BLOCKS]
            batch = ahead[: self._budget.blocks([self._geometry.size_of(order) for _, order in ahead])]
            done, failed, pause = self._window(batch, flags, alone=verify or bool(left))
            ended = time.perf_counter()
            yield done
            if left:
                left = left[len(batch) :]
            else:
                left = failed
                count += len(batch)
            if left or count < len(blocks):
                time.sleep(max(0.0, ended + rest_seconds(pause, self._duty) - time.perf_counter()))

    def _window(
        self, batch: Sequence[Block], flags: int, *, alone: bool
    ) -> tuple[list[BlockOutcome], list[Block], Pause]:
        """Move the blocks of one window; give the outcomes, and the blocks that are to be moved again, each alone."""
        addresses, orders = np.array(batch, np.int64).T
        sizes = np.int64(self._geometry.page_size) << orders
        deed = functools.partial(self._stop_and_move, batch, addresses, sizes, flags, alone=alone)
        objections, operations, lengths, pause = in_tracing_thread(deed)
        if pause.blocks:
            self.pauses.append(pause)
        self._budget.observe(pause)
        return *outcomes_of(batch, objections, operations, lengths), pause

    def _stop_and_move(
        self, batch: Sequence[Block], addresses: _Int64s, sizes: _Int64s, flags: int, *, alone: bool
    ) -> tuple[Sequence[Objection | None], NDArray[np.void], _Int64s, Pause]:
        """Carry out a window: what speaks against each block, the operations on the others, and the lengths of runs."""
        parked = worked = 0
        lengths, operations = np.empty(0, np.int64), stub.operations_for([], [], 0)
        with all_stopped(self._process, self._stop_timeout_ns, self._machine, self._threads) as frozen:
            self._threads = frozen.stopped
            stopped = time.perf_counter_ns()
            threads = len(frozen.tracees)
            objections = self._refuse(frozen, batch, addresses, addresses + sizes)
            rows = np.flatnonzero([objection is None for objection in objections])
            if len(rows):
                addresses, sizes = addresses[rows], sizes[rows]
                reach = self._geometry.pmd_size
                lengths = np.ones(len(rows), np.int64) if alone else run_lengths(addresses, sizes, reach)
                operations = operations_of(addresses, sizes, lengths, flags)
                injection = self._inject(frozen, len(operations))
                park(frozen, injection, operations)
                parked = time.perf_counter_ns()
                operations = work(frozen, injection, len(operations))
            worked = time.perf_counter_ns()
        copied = int(taken(operations["away"], operations["copied"]).sum())
        spent = int(taken(operations["begun"], operations["ended"]).sum())
        pause = Pause(
            blocks=len(rows),
            size=int(operations["length"].sum()),
            threads=threads,
            stop_ns=stopped - frozen.begun_ns,
            park_ns=(parked or worked) - stopped,
            move_ns=max(worked - (parked or worked) - copied, 0),
            copy_ns=copied,
            restore_ns=time.perf_counter_ns() - worked,
            work_ns=min(spent, worked - (parked or worked)),
        )
        return objections, operations, lengths, pause

    def _inject(self, frozen: FrozenProcess, operations: int) -> Injection:
        """Map the stub's memory in the target."""
        scratch = self._geometry.pmd_size
        layout = stub.Layout(0, len(frozen.stopped.tids), operations, scratch, frozen.machine)
        if self._place is None or self._place.size < layout.size:
            self._place = Place.find(frozen, layout.size, scratch)
        try:
            return inject(frozen, self._place, layout)
        except MthpError:
            # What was free may be taken by now.
            self._place = None
            raise

    def _refuse(
        self, frozen: FrozenProcess, batch: Sequence[Block], addresses: _Int64s, ends: _Int64s
    ) -> list[Objection | None]:
        """Return for each block why it must not be moved after all, now that nothing changes any more."""
        none: list[Objection | None] = [None] * len(batch)
        objections = list(self._check_again(frozen, batch)) if self._check_again else none
        for index in np.flatnonzero(touches(addresses, ends, special_ranges(frozen))).tolist():
            objections[index] = objections[index] or BlockRefusal.SPECIAL.objection
        return objections
