"""Park all threads, let one of them move blocks, fetch it again, and restore all threads.

The order of the steps makes the tracer's death harmless at every point. If it dies before the worker may run, the
threads give up after half a second, and nothing was moved; afterwards the worker finishes all blocks, and the threads
restore themselves. Once the worker may run, no thread may be released before DONE. The answer to every error in
between, also one in this program, is to do nothing: the tracing thread ends, and the target restores itself.
"""

from __future__ import annotations

import sys

import numpy as np
from numpy.typing import NDArray

from mthp.linux.mover import stub
from mthp.linux.mover.boot import await_worker
from mthp.linux.mover.freeze import FrozenProcess
from mthp.linux.mover.inject import Injection, explain_preparation
from mthp.linux.mover.steps import Step, reached

_POLL_SECONDS = 20e-6
_RSEQ_BYTES = 32
_ONE = (1).to_bytes(8, sys.byteorder)
_WORD_BYTES = 8


def special_ranges(frozen: FrozenProcess) -> list[tuple[int, int]]:
    """Return memory that the kernel uses for threads while they are stopped: rseq areas and tops of stacks."""
    stopped, machine = frozen.stopped, frozen.machine
    pointers = stopped.registers[:, machine.sp].tolist()
    ranges = [(pointer - machine.red_zone, pointer + _WORD_BYTES) for pointer in pointers]
    # Written by the kernel when the thread returns to user mode on another CPU.
    ranges += [(area, area + _RSEQ_BYTES) for area in stopped.rseq_areas.tolist() if area]
    return ranges


def park(frozen: FrozenProcess, injection: Injection, operations: NDArray[np.void]) -> None:
    """Park all threads, the worker first.

    Args:
        operations: :data:`~mthp.linux.mover.stub.OPERATION`, shape (blocks,).

    Raises:
        OSError: ESRCH if the target was killed.
    """
    layout, stopped, worker = injection.layout, frozen.stopped, injection.worker
    numbers = frozen.inner_tids()
    # Everything that a thread needs to restore itself, before any register is changed.
    frozen.write(layout.base, layout.executable)
    frozen.write(layout.contexts, layout.pack_contexts(stopped.homes, stopped.masks, numbers, worker.row))
    frozen.write(layout.header, stub.pack_header(layout, injection.booted.unmap, operations))
    # From here on, if the tracer dies, the worker waits in the stub for the other threads before it unmaps everything.
    frozen.write(layout.header + stub.WRITTEN_OFFSET, _ONE)
    reached(Step.WRITTEN)
    for tracee in frozen.tracees.values():
        tracee.borrow()
    stopped.park(layout.parked(stopped.homes), but=worker.row)


def work(frozen: FrozenProcess, injection: Injection, blocks: int) -> NDArray[np.void]:
    """Have the worker carry out the operations, restore all threads, and take everything out of the target.

    Returns:
        The operations with their results, :data:`~mthp.linux.mover.stub.OPERATION`, shape (blocks,).

    Raises:
        UnsupportedError, NotPermittedError: the target may not have a userfaultfd; nothing was moved.
    """
    layout, worker = injection.layout, injection.worker
    try:
        # The worker changes SETUP to GO, a thread that gives up changes it to ABORT, atomically: only one can.
        frozen.write(layout.header + stub.START_OFFSET, stub.WORK.to_bytes(8, sys.byteorder))
        reached(Step.RUNNING)
        # Polling interrupts the worker where both share a processor.
        await_worker(frozen, worker.tid, lambda: _state(frozen, layout) >= stub.DONE, _POLL_SECONDS)
        reached(Step.DONE)
        prepared = frozen.read(layout.header + stub.PREPARED_OFFSET, stub.PREPARED_BYTES)
        size = blocks * stub.OPERATION.itemsize
        results: NDArray[np.void] = np.frombuffer(frozen.read(layout.header + stub.HEADER_BYTES, size), stub.OPERATION)
        # Before everything is unmapped: they are still in the stub's code.
        frozen.put_back_others(worker)
        injection.take_out()
        reached(Step.UNPARKED)
    except BaseException:
        frozen.abandon()
        raise
    stage, error = stub.unpack_preparation(prepared)
    if error:
        raise explain_preparation(frozen.process.label, stage, error)
    return results


def _state(frozen: FrozenProcess, layout: stub.Layout) -> int:
    return int.from_bytes(frozen.read(layout.header, stub.STATE_BYTES), sys.byteorder)
