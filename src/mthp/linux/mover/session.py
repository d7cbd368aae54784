"""Hold the memory of another process: stop all its threads and have one of them move the blocks.

:meth:`MoverSession._stop_and_move` shows a window in its order: stop (freeze), check again (recheck), bring the stub
in (inject), park all threads and let one of them work (park), release all (freeze).
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

from mthp.errors import MthpError, TargetVanishedError, UnsupportedError, UsageError
from mthp.geometry import Geometry
from mthp.linux.mover import stub
from mthp.linux.mover.adjacent import operations_of, outcomes_of, run_lengths, taken
from mthp.linux.mover.arch import native
from mthp.linux.mover.arch.architecture import Architecture
from mthp.linux.mover.arch.x86_64 import has_protection_keys
from mthp.linux.mover.freeze import STOP_TIMEOUT_NS, WORKER_TIMEOUT_NS, FrozenProcess
from mthp.linux.mover.hold import Hold
from mthp.linux.mover.inject import Injection, Place, inject
from mthp.linux.mover.outcome import Objection
from mthp.linux.mover.park import park, special_ranges, work
from mthp.linux.mover.pause import Pause, PauseBudget, rest_seconds
from mthp.linux.mover.recheck import Before, Recheck
from mthp.linux.mover.refuse.block import BlockRefusal, touches
from mthp.linux.mover.refuse.threads import check_threads
from mthp.linux.mover.steps import Step, reached
from mthp.linux.mover.taskfiles import read_threads
from mthp.linux.mover.tracee import Stopped
from mthp.linux.process import Process
from mthp.means import MAX_PAUSE_NS, PAUSE_SHARE, Means
from mthp.ptes import Block
from mthp.results import BlockOutcome

_PR_SET_TIMERSLACK = 29
_T = TypeVar("_T")
_libc = ctypes.CDLL(None, use_errno=True)


def in_tracing_thread(operation: Callable[[], _T]) -> _T:
    """Run `operation` in a new thread, which nothing interrupts, and return its result."""
    # An interruption while the thread is being started may leave it unknown to the executor, which then would not wait
    # for its end. So it begins only with this permission.
    begin: SimpleQueue[bool] = SimpleQueue()
    # A tracer is a thread, and its end releases all its tracees (exit_ptrace, kernel/ptrace.c), also those that never
    # stopped, which PTRACE_DETACH refuses. And Python raises KeyboardInterrupt in the main thread, which waits here.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="mthp-mover", initializer=_hurry) as executor:
        try:
            future = executor.submit(lambda: operation() if begin.get() else None)
            begin.put(True)
            return cast("_T", future.result())
        except BaseException:
            begin.put(False)  # Not read if the thread has its permission already.
            raise


def _hurry() -> None:
    """Have this thread, which ends soon, run before the target's threads and sleep no longer than requested."""
    # Where the next line is not permitted: by default an ordinary thread sleeps up to 50 us too long (prctl(2)).
    _libc.prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1), 0, 0, 0)
    with contextlib.suppress(OSError):
        # Threads of the target that spin would delay the release of the others by milliseconds.
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


MAX_BLOCKS = 512
"""Limit of the blocks in one window."""

CheckAgain = Callable[[FrozenProcess, Sequence[Block]], Sequence[Objection | None]]
"""Called when all threads are stopped: returns for each block the reason not to move it after all, or None."""

_Int64s = NDArray[np.int64]


@contextlib.contextmanager
def all_stopped(frozen: FrozenProcess) -> Iterator[None]:
    """Stop every thread of a process, and release all of them afterwards.

    Raises:
        CannotStopError, NotPermittedError: as :meth:`FrozenProcess.stop`.
    """
    process = frozen.process
    # Before the stop, so that its time is not a part of the pause; only threads that are new then are checked inside.
    known = check_threads(process, read_threads(process))
    try:
        frozen.stop(known)
        reached(Step.STOPPED)
        yield
    except OSError as error:
        # Every request for a thread that SIGKILL has woken from its stop ends with ESRCH.
        if error.errno != errno.ESRCH:
            raise
        raise TargetVanishedError(f"process {process.label} was killed") from error
    finally:
        frozen.release()


class MoverSession(Hold):
    """A hold on another process, to move its blocks to new folios.

    Between two windows the target contains nothing of it; it keeps only measurements.

    The caller has enabled exactly one folio size for the time of :meth:`move`, and has made all checks of
    :mod:`mthp.linux.mover.refuse`. If the target is a child of this process, no other thread may wait for that child
    meanwhile, because wait(2) would report the stops of a tracee to the first caller.

    Args:
        process: the target; the caller keeps it open and closes it.
        max_pause_ns: limit of a pause in nanoseconds; pauses are measured, and windows adapted to it.
        duty: the share of the time that the target may be stopped, above 0, up to 1.
        stop_timeout_ns: nanoseconds that threads may take to stop before they are released.
        worker_timeout_ns: nanoseconds that the thread with injected code may take to stop, or to get on.
        machine: architecture of the target; by default that of this program.
        recheck: called for all blocks once all threads are stopped.

    Attributes:
        pauses: every window in which blocks were moved; the owner of a long session may empty the list.

    Raises:
        UnsupportedError: no stub for this machine, or the target is this process.
        UsageError: `max_pause_ns` or `duty` out of range.
    """

    checks_again = True

    def __init__(
        self,
        process: Process,
        geometry: Geometry,
        *,
        max_pause_ns: int = MAX_PAUSE_NS,
        duty: float = PAUSE_SHARE,
        stop_timeout_ns: int = STOP_TIMEOUT_NS,
        worker_timeout_ns: int = WORKER_TIMEOUT_NS,
        machine: Architecture | None = None,
        recheck: CheckAgain | None = None,
    ) -> None:
        if process.is_self:
            raise UnsupportedError("a process cannot trace itself", help="use mthp.collapse_self")
        self.pauses: list[Pause] = []
        self._machine = machine or native()
        self._threads: Stopped | None = None
        self._process = process
        self._geometry = geometry
        self._timeouts_ns = stop_timeout_ns, worker_timeout_ns
        self._check_again = recheck
        self._recheck: Recheck | None = None
        self._budget = PauseBudget(max_pause_ns, MAX_BLOCKS)
        self.limit(max_pause_ns, duty)
        self._place: Place | None = None
        # A protection key may bar the worker, a thread with its own rights, from another thread's memory.
        # Populating then returns an error where the copying would fault.
        self._populate_first = has_protection_keys()

    def limit(self, max_pause_ns: int, duty: float) -> None:
        """Limit pauses to `max_pause_ns`, and to the share `duty` of the time; raise UsageError if out of range."""
        if max_pause_ns <= 0:
            raise UsageError(f"a pause of {max_pause_ns} ns is not above 0")
        if not 0 < duty <= 1:
            raise UsageError(f"a duty of {duty} is not above 0 and at most 1")
        self._duty = duty
        self._budget.limit(max_pause_ns)

    def too_large(self, order: int) -> range:
        """Return all larger orders but the PMD's: its folios do not fit where there is a page table."""
        return range(order + 1, self._geometry.pmd_order)

    def windows(self, blocks: Sequence[Block], means: Means, before: Before) -> Iterator[list[BlockOutcome]]:
        """Move blocks as :meth:`move` does, and check them again after the stop."""
        self.limit(means.max_pause_ns, means.pause_share)
        self._recheck = self._recheck or Recheck(self._process, self._geometry)
        self._check_again = functools.partial(self._recheck.objections, before=before)
        # Populating first makes pages exclusive again that were shared with a child that has exited. It does not fill
        # unwanted holes: after the stop blocks with such holes are refused.
        return self._windows(blocks, verify=means.verify, fill=True)

    def take_pauses(self) -> list[int]:
        pauses, self.pauses = self.pauses, []
        return [pause.total_ns for pause in pauses]

    def close(self) -> None:
        if self._recheck:
            self._recheck.close()
            self._recheck = None

    def move(self, blocks: Sequence[Block], *, verify: bool = False, fill: bool = False) -> list[BlockOutcome]:
        """Move each block to new memory, which is one folio of its order if the machine's switches make it so.

        An outcome shows whether the bytes lie in new memory, and in `copied` how many pages were moved; the page tables
        show the order of their folios.

        Args:
            blocks: (address, order) of each; aligned, distinct.
            verify: compare a hash of the bytes before and after, inside the window.
            fill: populate absent pages first.

        Returns:
            The outcomes of the blocks, in their order.

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
                # The page table stays when its pages are moved away, and prevents a PMD fault.
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
            # Before the caller gets the outcomes: what it does with them is rest for the target, too.
            ended = time.perf_counter()
            yield done
            # The blocks of a failed run come before further ones, each alone, so that an error is the block's own.
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
        """Move the blocks of one window; return the outcomes, and the blocks to be moved again, each alone."""
        addresses, orders = np.array(batch, np.int64).T
        sizes = np.int64(self._geometry.page_size) << orders
        operation = functools.partial(self._stop_and_move, batch, addresses, sizes, flags, alone=alone)
        objections, operations, lengths, pause = in_tracing_thread(operation)
        # A window in which every block was refused still tells what stopping costs.
        if pause.blocks:
            self.pauses.append(pause)
        self._budget.observe(pause)
        return *outcomes_of(batch, objections, operations, lengths), pause

    def _stop_and_move(
        self, batch: Sequence[Block], addresses: _Int64s, sizes: _Int64s, flags: int, *, alone: bool
    ) -> tuple[Sequence[Objection | None], NDArray[np.void], _Int64s, Pause]:
        """Carry out a window; return the objections to blocks, operations on the others, and the lengths of runs."""
        parked = worked = 0
        lengths, operations = np.empty(0, np.int64), stub.operations_for([], [], 0)
        stop_ns, worker_ns = self._timeouts_ns
        frozen = FrozenProcess(self._process, stop_ns, self._machine, self._threads, worker_ns)
        with all_stopped(frozen):
            # Kept for the next window, which uses their tables of system calls again if the threads are the same.
            self._threads = frozen.stopped
            stopped = time.perf_counter_ns()
            threads = len(frozen.tracees)
            # From here to the end of the block no thread runs user code, and so no mapping, file or block changes.
            objections = self._refuse(frozen, batch, addresses, addresses + sizes)
            rows = np.flatnonzero([objection is None for objection in objections])
            if len(rows):
                addresses, sizes = addresses[rows], sizes[rows]
                reach = self._geometry.pmd_size
                # A hash covers a whole operation, so blocks to be verified are moved alone.
                lengths = np.ones(len(rows), np.int64) if alone else run_lengths(addresses, sizes, reach)
                operations = operations_of(addresses, sizes, lengths, flags)
                injection = self._inject(frozen, len(operations))
                park(frozen, injection, operations)
                parked = time.perf_counter_ns()
                # The worker creates and closes the userfaultfd in there, while no thread can fork: a child would have
                # it, bound to its parent's memory, because close-on-exec does not concern fork(2).
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
        scratch = self._geometry.pmd_size
        layout = stub.Layout(0, len(frozen.stopped.tids), operations, scratch, frozen.machine)
        if self._place is None or self._place.size < layout.size:
            self._place = Place.find(frozen, layout.size, scratch)
        try:
            return inject(frozen, self._place, layout)
        except MthpError:
            # Addresses that were free may be taken by now.
            self._place = None
            raise

    def _refuse(
        self, frozen: FrozenProcess, batch: Sequence[Block], addresses: _Int64s, ends: _Int64s
    ) -> list[Objection | None]:
        """Return for each block the reason not to move it after all, now that nothing changes any more, or None."""
        none: list[Objection | None] = [None] * len(batch)
        objections = list(self._check_again(frozen, batch)) if self._check_again else none
        for index in np.flatnonzero(touches(addresses, ends, special_ranges(frozen))).tolist():
            objections[index] = objections[index] or BlockRefusal.SPECIAL.objection
        return objections
