"""The mover: collapse ranges of a running process to folios of any order, now.

No system call of any kernel collapses memory to an order below the PMD's. But the kernel puts one folio of a size that
is enabled into an empty, aligned range at the first fault. So the mover makes a range empty and faults it in again,
with the same bytes, while no other thread can see it.

Reading order
-------------
1. :mod:`~mthp.linux.mover.mover`: the loop, for another process and for this one: check, switch, move, verify.
2. :mod:`~mthp.linux.mover.refuse`: what is not moved, and why; :mod:`~mthp.linux.mover.recheck`: what of it is checked
   again after the stop.
3. :mod:`~mthp.linux.mover.session`: a window of another process, in the order in which it happens:

   - :mod:`~mthp.linux.mover.freeze` *stops* every thread (:mod:`~mthp.linux.mover.tracee` has them in columns);
   - :mod:`~mthp.linux.mover.inject` brings the code of ``arch/stub_*.S`` in, through :mod:`~mthp.linux.mover.boot`;
   - :mod:`~mthp.linux.mover.park` has all threads wait in there, and one of them, the *worker*, move: for each run of
     neighbours (:mod:`~mthp.linux.mover.runs`) the pages go to scratch memory (UFFDIO_MOVE), and copying the bytes back
     faults in a folio of the wanted order for each block;
   - all threads are released as they were (:mod:`~mthp.linux.mover.reentry`).

4. :mod:`~mthp.linux.mover.guarded`: a window of this process, in which no thread is stopped.

UFFDIO_MOVE (Linux 6.8) makes the kernel itself refuse what is pinned, shared or locked. It needs a destination that is
registered with a userfaultfd; one that sees only faults of user mode can be created without privilege.

States
------
A thread of the target goes through SEIZED, STOPPED, BORROWED, RUNNING and RETURNED
(:class:`~mthp.linux.mover.tracee.State`). The stub has a state of its own, a word of the target's memory::

    SETUP --the worker begins--> GO --all blocks are done--> DONE
      '--half a second without a tracer--> ABORT

What could go wrong, and why it does not
----------------------------------------
*The target sees its memory half moved.* No thread runs user code while blocks are away. All threads are stopped, also
those made meanwhile, and those that are exiting are waited for, because they still write. What other processes could
do (CLONE_VM, pins, io_uring) is refused beforehand.

*Another process reaches what is ours.* The worker creates and closes the userfaultfd within the window, while no thread
can fork, and processes that share the table of files are refused. Between two windows the target has no descriptor, no
mapping and no thread of ours.

*We die.* The kernel releases the tracees of a dead tracer at once, wherever they are. So each thread is parked with a
context from which it restores itself. In SETUP, threads that no tracer restores give up after half a second: nothing
has happened. In GO, the worker carries all blocks to the end, closes the userfaultfd and sets DONE, and all threads
restore themselves; the worker unmaps the stub when no other thread can be in it. This costs at most an EINTR that was
due and the restart of a timeout. The code that maps and unmaps the stub needs no tracer from its first instruction on.

*Something breaks inside of us.* Every window runs in a thread of its own (:mod:`~mthp.linux.mover.session`),
whose end makes the kernel release whatever is still traced: for the target, that is our death. In doubt the code ends
that thread rather than try to repair.

*The bytes are wrong.* The stub copies exactly the bytes that the kernel reports as moved, also when it moved a part;
with `verify`, it hashes each block before and after, inside the window.

*The order is wrong.* If the kernel has no folio of the enabled size, it falls back to smaller ones. The bytes are right
then, too, and the page tables show it (the seam reads them afterwards).

How long it takes is measured in every window, phase by phase, and the next window is filled accordingly
(:mod:`~mthp.linux.mover.pause`). Stopping, parking and restoring take some 20 microseconds a thread, most of it for a
dozen system calls (:mod:`~mthp.linux.mover.calls`).

Not promised: references that the kernel cannot see as pins (pages in a pipe after vmsplice(2)); other processes that
write into the target at that moment (process_vm_writev(2), /proc/PID/mem); that an interrupted read or write which had
transferred a part goes on with the rest.
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
