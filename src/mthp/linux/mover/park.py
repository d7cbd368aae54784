"""Park all threads, let one of them move blocks, and fetch it again.

The order of things is what makes the tracer's death harmless at every point:

1. Contexts and operations are written while no register was changed. A context has all that a thread needs to restore
   itself.
2. Each thread is given the registers of the parking loop, and only then has all signals blocked. In between it could
   run a handler, but in the loop, on its own stack, and the loop blocks the signals itself.
3. The worker is parked like the others. As the very last step it is given the worker's entry, where it first changes
   the state from SETUP to GO, atomically. If we die before that, the threads wait half a second, change SETUP to ABORT
   and restore themselves; nothing was moved. If we die later, the worker finishes all blocks, sets DONE, and everybody
   restores himself.
4. A living tracer waits for DONE, stops the worker again, and gives every thread exactly what it had.

Once the worker may run, nothing but DONE makes it right to let another thread go. Whatever goes wrong in between, even
in this very program, is answered by doing nothing: the tracing thread ends, and the target restores itself.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mthp.errors import TargetVanishedError
from mthp.linux.mover import ptrace, stub
from mthp.linux.mover.freeze import FrozenProcess
from mthp.linux.mover.inject import Injection, choose
from mthp.linux.mover.steps import Observer, Step
from mthp.linux.mover.tracee import Tracee

_POLL_SECONDS = 10e-6
_RED_ZONE_BYTES = 128
_RSEQ_BYTES = 32
_WORD_BYTES = 8


def special_ranges(frozen: FrozenProcess) -> list[tuple[int, int]]:
    """Memory that the kernel uses for threads while they are stopped, sorted: rseq areas and tops of stacks."""
    ranges = []
    for tracee in frozen.tracees.values():
        ranges.append((tracee.registers.rsp - _RED_ZONE_BYTES, tracee.registers.rsp + _WORD_BYTES))
        if tracee.rseq_area:
            ranges.append((tracee.rseq_area, tracee.rseq_area + _RSEQ_BYTES))
    return sorted(ranges)


def touches(ranges: Sequence[tuple[int, int]], start: int, end: int) -> bool:
    """Whether one of the sorted, short `ranges` overlaps the block from `start` to `end`."""
    at = bisect_left(ranges, (end,))
    # Ranges differ in length by less than a page, so one that reaches in begins at most that far before.
    while at and ranges[at - 1][0] > start - stub.PAGE:
        if ranges[at - 1][1] > start:
            return True
        at -= 1
    return False


def park(frozen: FrozenProcess, injection: Injection, operations: NDArray[np.void], observer: Observer) -> Tracee:
    """Park all threads and give the worker, which is parked too.

    Args:
        operations: :data:`~mthp.linux.mover.stub.OPERATION`, shape (blocks,).

    Raises:
        TargetVanishedError: the target was killed.
        OSError: ESRCH, likewise.
    """
    layout = injection.layout
    tracees = list(frozen.tracees.values())
    homes = [tracee.home for tracee in tracees]
    contexts = [layout.pack_context(home, tracees[index].mask, index) for index, home in enumerate(homes)]
    frozen.write(layout.contexts, b"".join(contexts))
    frozen.write(layout.header, stub.pack_header(layout, injection.uffd, injection.nonce, operations))
    observer(Step.WRITTEN)
    for index, tracee in enumerate(tracees):
        tracee.touched = True
        ptrace.set_registers(tracee.tid, layout.park(homes[index], index, stub.ENTRY_PARK))
        observer(Step.PARKED_UNMASKED)
        ptrace.set_signal_mask(tracee.tid, ptrace.ALL_SIGNALS)
        observer(Step.PARKED)
    return choose(frozen)


def work(
    frozen: FrozenProcess, injection: Injection, worker: Tracee, blocks: int, observer: Observer
) -> tuple[NDArray[np.void], bool]:
    """Have the worker carry out the operations, and stop it again.

    Returns:
        The operations with their results, :data:`~mthp.linux.mover.stub.OPERATION`, shape (blocks,); and whether the
        worker was fetched in time. If not, it has restored itself, or is doing so: it may be in a signal handler from
        which it returns to the stub, whose memory is not to be written or unmapped any more, then.

    Raises:
        TargetVanishedError: the target was killed.
    """
    layout = injection.layout
    index = list(frozen.tracees).index(worker.tid)
    finished = False
    try:
        ptrace.set_registers(worker.tid, layout.park(worker.home, index, stub.ENTRY_WORKER))
        observer(Step.ARMED)
        ptrace.cont(worker.tid)
        observer(Step.RUNNING)
        _await_done(frozen, layout, worker)
        observer(Step.DONE)
        finished = True
    finally:
        if not finished:
            frozen.abandon()
    size = blocks * stub.OPERATION.itemsize
    results: NDArray[np.void] = np.frombuffer(frozen.read(layout.header + stub.HEADER_BYTES, size), stub.OPERATION)
    fetched = _fetch(frozen, layout, worker)
    observer(Step.FETCHED)
    return results, fetched


def _await_done(frozen: FrozenProcess, layout: stub.Layout, worker: Tracee) -> None:
    while stub.unpack_state(frozen.read(layout.header, stub.STATE_BYTES)) < stub.DONE:
        stop = frozen.poll(worker.tid)
        if stop is not None:
            # SIGSTOP and the stop of the group are passed. A fault of the worker's own kills the target, as it should.
            frozen.resume(worker.tid, stop)
        elif frozen.has_exited(worker.tid):
            raise TargetVanishedError(f"process {frozen.process.label} was killed")
        else:
            time.sleep(_POLL_SECONDS)


def _fetch(frozen: FrozenProcess, layout: stub.Layout, worker: Tracee) -> bool:
    """Stop the worker, which waits for this; False if we were too slow, and it goes its own way."""
    if not frozen.stop_again(worker.tid):
        raise TargetVanishedError(f"process {frozen.process.label} was killed")
    fetched = layout.holds_code(ptrace.get_registers(worker.tid).rip)
    if not fetched:
        frozen.examine(worker.tid)
    return fetched
