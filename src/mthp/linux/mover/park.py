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

import numpy as np
from numpy.typing import NDArray

from mthp.errors import TargetVanishedError
from mthp.linux.mover import ptrace, stub
from mthp.linux.mover.freeze import WORKER_TIMEOUT_NS, FrozenProcess
from mthp.linux.mover.inject import Injection, choose
from mthp.linux.mover.steps import Observer, Step
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


def park(frozen: FrozenProcess, injection: Injection, operations: NDArray[np.void], observer: Observer) -> Tracee:
    """Park all threads and give the worker, which is parked too.

    Args:
        operations: :data:`~mthp.linux.mover.stub.OPERATION`, shape (blocks,).

    Raises:
        TargetVanishedError: the target was killed.
        OSError: ESRCH, likewise.
        CannotStopError: the worker must not be given our code, by now.
    """
    worker = choose(frozen)
    if worker.tid != frozen.process.pid:
        # The first thread was looked at once more with all else; another one may filter its calls by now, too.
        frozen.check_thread(worker.tid)
    layout, stopped = injection.layout, frozen.stopped
    frozen.write(layout.contexts, layout.pack_contexts(stopped.homes, stopped.masks))
    frozen.write(layout.header, stub.pack_header(layout, injection.uffd, injection.nonce, operations))
    observer(Step.WRITTEN)
    for tracee in frozen.tracees.values():
        tracee.touched = True
    stopped.park(layout.parked(stopped.homes), observer)
    return worker


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
    size = blocks * stub.OPERATION.itemsize
    results: NDArray[np.void] = np.frombuffer(frozen.read(layout.header + stub.HEADER_BYTES, size), stub.OPERATION)
    fetched = _fetch(frozen, layout, worker)
    observer(Step.FETCHED)
    return results, fetched


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
