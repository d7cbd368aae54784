"""The mover: collapse ranges of a running process to folios of any order, now.

No system call of any kernel collapses memory to an order below the PMD's. But the kernel puts one folio of an enabled
size into an empty, aligned range at the first fault. So the mover empties a range and faults it in again, with the same
bytes, while no other thread can see it.

Reading order
-------------
1. :mod:`~mthp.linux.mover.mover`: the loop, for another process and for this one: check, switch, move, verify.
2. :mod:`~mthp.linux.mover.refuse`: the refusals and their reasons; :mod:`~mthp.linux.mover.recheck`: those that are
   checked again after the stop.
3. :mod:`~mthp.linux.mover.session`: a window of another process, in the order in which it happens:

   - :mod:`~mthp.linux.mover.freeze` *stops* every thread (:mod:`~mthp.linux.mover.tracee` keeps them in columns);
   - :mod:`~mthp.linux.mover.inject` brings the code of ``arch/stub_*.S`` in, through :mod:`~mthp.linux.mover.boot`;
   - :mod:`~mthp.linux.mover.park` makes all threads wait in that code, and one of them, the *worker*, move: for each
     run of neighbours (:mod:`~mthp.linux.mover.runs`) the pages go to scratch memory (UFFDIO_MOVE), and copying the
     bytes back faults in a folio of the wanted order for each block;
   - all threads are restored and released (:mod:`~mthp.linux.mover.reentry`).

4. :mod:`~mthp.linux.mover.guarded`: a window of this process, in which no thread is stopped.

UFFDIO_MOVE (Linux 6.8) makes the kernel refuse pinned, shared and locked pages. Its destination has to be registered
with a userfaultfd; one that handles only faults of user mode can be created without privilege.

States
------
A thread of the target goes through SEIZED, STOPPED, BORROWED, RUNNING and RETURNED
(:class:`~mthp.linux.mover.tracee.State`). The stub has a state of its own, a word of the target's memory::

    SETUP --the worker begins--> GO --all blocks are done--> DONE
      '--half a second without a tracer--> ABORT

What could go wrong, and why it does not
----------------------------------------
*The target sees its memory half moved.* No thread runs user code while blocks are away. All threads are stopped, also
new ones. The window waits for exiting threads, because they still write. Whatever other processes could do (CLONE_VM,
pins, io_uring) is refused beforehand.

*Another process reaches the mover's descriptor or memory.* The worker creates and closes the userfaultfd within the
window, while no thread can fork, and processes that share their table of files are refused. Between two windows the
target has no descriptor, mapping or thread of the mover.

*The tracer dies.* The kernel releases the tracees of a dead tracer at once, wherever they are. So each thread is parked
with a context from which it restores itself. In SETUP, threads without a tracer give up after half a second: nothing
has happened. In GO, the worker moves all blocks, closes the userfaultfd and sets DONE, and all threads
restore themselves; the worker unmaps the stub when no other thread can be in it. The cost is at most a due EINTR and a
restarted timeout. The code that maps and unmaps the stub needs no tracer from its first instruction on.

*The mover has an error.* Every window runs in a thread of its own (:mod:`~mthp.linux.mover.session`). When that thread
ends, the kernel releases all tracees: for the target, the tracer has died. In doubt the mover ends that thread and does
not try to repair.

*The bytes are wrong.* The stub copies exactly the bytes that the kernel reports as moved, also after a partial move;
with `verify`, it hashes each block before and after, inside the window.

*The order is wrong.* If the kernel has no folio of the enabled size, it falls back to smaller ones. The bytes are still
right, and the page tables show the order (the seam reads them afterwards).

Every window measures how long it takes, phase by phase, and sets the size of the next one
(:mod:`~mthp.linux.mover.pause`). Stopping, parking and restoring take some 20 microseconds a thread, mostly for a
dozen system calls (:mod:`~mthp.linux.mover.calls`).

Not promised: references that the kernel cannot see as pins (pages in a pipe after vmsplice(2)); other processes that
write into the target at that moment (process_vm_writev(2), /proc/PID/mem); the rest of an interrupted read or write
that had transferred a part.
"""

from mthp.linux.mover.freeze import FrozenProcess
from mthp.linux.mover.pause import Pause
from mthp.linux.mover.session import MoverSession
from mthp.linux.mover.tracee import CannotStopError

__all__ = [
    "CannotStopError",
    "FrozenProcess",
    "MoverSession",
    "Pause",
]
