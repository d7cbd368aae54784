"""Park all threads, let one of them move blocks, fetch it again, and restore all of them.

The order of things is what makes the tracer's death harmless at every point:

1. Contexts and operations are written while no register was changed. A context has all that a thread needs to restore
   itself.
2. Each thread is given the registers of the parking loop, and only then has all signals blocked. In between it could
   run a handler, but in the loop, on its own stack, and the loop blocks the signals itself.
3. The worker is parked like the others, but first. As the very last step it is given the worker's entry, where it
   changes the state from SETUP to GO, atomically. If we die before that, the threads wait half a second, change SETUP
   to ABORT and restore themselves; nothing was moved. If we die later, the worker finishes all blocks, closes the
   userfaultfd, sets DONE, and the threads restore themselves.
4. A living tracer waits for DONE, stops the worker again, restores every thread exactly as it was, and has the worker
   unmap everything. After our death the worker waits until all others have left, and unmaps everything then.

Once the worker may run, nothing but DONE makes it right to let another thread go. Whatever goes wrong in between, even
in this very program, is answered by doing nothing: the tracing thread ends, and the target restores itself.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from mthp.errors import TargetVanishedError
from mthp.linux.mover import ptrace, stub
from mthp.linux.mover.freeze import WORKER_TIMEOUT_NS, FrozenProcess
from mthp.linux.mover.inject import Injection, explain_preparation
from mthp.linux.mover.steps import Observer, Step
from mthp.linux.mover.taskfiles import inner_tids
from mthp.linux.mover.tracee import CannotStopError, Tracee

_POLL_SECONDS = 20e-6
_LONGEST_POLL_SECONDS = 250e-6
_PATIENCE = 0.125
_RSEQ_BYTES = 32
_WORD_BYTES = 8


def special_ranges(frozen: FrozenProcess) -> list[tuple[int, int]]:
    """Memory that the kernel uses for threads while they are stopped: rseq areas and tops of stacks."""
    stopped, machine = frozen.stopped, frozen.machine
    pointers = stopped.registers[:, machine.sp].tolist()
    ranges = [(pointer - machine.red_zone, pointer + _WORD_BYTES) for pointer in pointers]
    ranges += [(area, area + _RSEQ_BYTES) for area in stopped.rseq_areas.tolist() if area]
    return ranges


def park(frozen: FrozenProcess, injection: Injection, operations: NDArray[np.void], observer: Observer) -> None:
    """Park all threads, the worker first.

    Args:
        operations: :data:`~mthp.linux.mover.stub.OPERATION`, shape (blocks,).

    Raises:
        TargetVanishedError: the target was killed.
        OSError: ESRCH, likewise.
    """
    layout, stopped, worker = injection.layout, frozen.stopped, injection.worker
    numbers = inner_tids(frozen.process, stopped.tids)
    frozen.write(layout.base, layout.executable)
    frozen.write(layout.contexts, layout.pack_contexts(stopped.homes, stopped.masks, numbers, worker.row))
    frozen.write(layout.header, stub.pack_header(layout, injection.unmap, operations))
    observer(Step.WRITTEN)
    # Until the worker is parked, it would unmap everything after our death; from then on it waits for the others.
    parked = layout.parked(stopped.homes)
    ptrace.set_registers(worker.tid, parked[worker.row : worker.row + 1])
    for tracee in frozen.tracees.values():
        tracee.touched = True
    stopped.park(parked, observer)


def work(frozen: FrozenProcess, injection: Injection, blocks: int, observer: Observer) -> NDArray[np.void]:
    """Have the worker carry out the operations, restore all threads, and take everything out of the target.

    Returns:
        The operations with their results, :data:`~mthp.linux.mover.stub.OPERATION`, shape (blocks,).

    Raises:
        TargetVanishedError: the target was killed.
        UnsupportedError, NotPermittedError: the target may not have a userfaultfd; nothing was moved.
    """
    layout, worker = injection.layout, injection.worker
    finished = False
    try:
        ptrace.set_registers(worker.tid, layout.parked(frozen.stopped.homes, worker=worker.row))
        observer(Step.ARMED)
        frozen.ran.add(worker.tid)
        ptrace.cont(worker.tid)
        observer(Step.RUNNING)
        _await_done(frozen, layout, worker)
        observer(Step.DONE)
        finished = True
    finally:
        if not finished:
            frozen.abandon()
    prepared = frozen.read(layout.header + stub.PREPARED_OFFSET, stub.PREPARED_BYTES)
    size = blocks * stub.OPERATION.itemsize
    results: NDArray[np.void] = np.frombuffer(frozen.read(layout.header + stub.HEADER_BYTES, size), stub.OPERATION)
    fetched = _fetch(frozen, layout, worker)
    observer(Step.FETCHED)
    frozen.put_back_others(worker, observer)
    if fetched:  # Otherwise we were so slow that it restores itself, and unmaps everything, as after our death.
        injection.take_out(observer)
        observer(Step.UNPARKED)
    stage, error = stub.unpack_preparation(prepared)
    if error:
        raise explain_preparation(frozen.process.label, stage, error)
    return results


def _await_done(frozen: FrozenProcess, layout: stub.Layout, worker: Tracee) -> None:
    begun = time.monotonic_ns()
    while stub.unpack_state(frozen.read(layout.header, stub.STATE_BYTES)) < stub.DONE:
        stop = frozen.poll(worker.tid)
        if stop is not None:
            # SIGSTOP and the stop of the group are passed. A fault of the worker's own kills the target, as it should.
            frozen.resume(worker.tid, stop)
            begun = time.monotonic_ns()
        elif frozen.has_exited(worker.tid):
            raise TargetVanishedError(f"process {frozen.process.label} was killed")
        elif time.monotonic_ns() - begun > WORKER_TIMEOUT_NS:
            raise CannotStopError(
                f"thread {worker.tid} of process {frozen.process.label}, which moves its pages, does not get on",
                help="its cgroup is frozen, or leaves it no time; once it runs, it finishes by itself",
            )
        else:
            # Where the two share a processor, to look is to interrupt the worker: look the less often the longer it
            # takes, up to a bound: it may be stopped by a signal, and stands still with all others until we see it.
            waited = (time.monotonic_ns() - begun) * 1e-9
            time.sleep(min(max(_POLL_SECONDS, waited * _PATIENCE), _LONGEST_POLL_SECONDS))


def _fetch(frozen: FrozenProcess, layout: stub.Layout, worker: Tracee) -> bool:
    """Stop the worker, which waits for this; False if we were too slow, and it goes its own way."""
    if not frozen.stop_again(worker.tid):
        raise TargetVanishedError(f"process {frozen.process.label} was killed")
    machine = frozen.machine
    fetched = layout.holds_code(int(ptrace.get_registers(worker.tid, machine.words)[0, machine.pc]))
    if not fetched:
        frozen.examine_again(worker.tid)
    return fetched
