"""The mover: collapse ranges of a living process to folios of any order, now.

No system call of any kernel collapses memory to an order below the PMD's. But the kernel does give a whole folio of a
size that is enabled to the first fault in an empty, aligned range. So the mover makes a range empty and faults it in
again, with the same bytes, while nobody looks:

1. *Stop* every thread of the target (:mod:`~mthp.linux.mover.freeze`).
2. For each block, or for a run of neighbours together (:mod:`~mthp.linux.mover.runs`), *move* the pages away into
   scratch memory (UFFDIO_MOVE), *copy* the bytes back, which faults in one folio of the wanted order for each block,
   and drop the scratch pages.
3. *Let go* of all threads, as they were.

Only the target itself can fault its own memory in, so step 2 is done by one of its threads, the *worker*. It runs some
code (``arch/stub_*.S``) in a mapping that exists for the time of the window. That mapping is
brought in by code in the padding behind the target's own (:mod:`~mthp.linux.mover.inject`). Of the ways to move pages
away, UFFDIO_MOVE (Linux 6.8) is the one with which the kernel itself refuses what is pinned, shared or locked. It wants
its destination registered with a userfaultfd; one that sees only faults of user mode can be created without privilege.

What could go wrong, and why it does not
----------------------------------------
*The target sees its memory half moved.* No thread runs user code while blocks are away. All threads are stopped, also
those that were made meanwhile, and those that were exiting are waited for, since they still write (freeze). What other
processes could do (CLONE_VM, pins, io_uring) is refused beforehand (:mod:`~mthp.linux.mover.refuse`), not here.

*Another process reaches what is ours.* The userfaultfd is created and closed by the worker within the window, while no
thread can fork, and processes that share the table of files are refused. Between two windows the target has nothing of
ours: no descriptor, no mapping, no thread.

*We die.* A tracer that dies releases its tracees at once, wherever they are. So before the worker may do anything,
every thread is *parked* (:mod:`~mthp.linux.mover.park`): it gets the registers of a loop in the stub that waits, and at
last restores the thread by itself, from a context in the target's own memory. The worker begins by changing the state
from SETUP to GO with an atomic instruction. Before that, parked threads that no tracer restores give up after half a
second and restore themselves: nothing has happened. After that, the worker carries all blocks to the end, with or
without us, closes the userfaultfd, says DONE, and all threads restore themselves. The worker is the last: it waits
until no other thread can be in the mapping, and unmaps it. A tracer that lives restores every thread exactly; one that
does not costs at most an EINTR that was due and the restart of a timeout.

*We die while the mapping is made or unmapped.* The thread that does it runs code that has all its registers as data and
ends by restoring it (:mod:`~mthp.linux.mover.inject`); it needs no tracer from the first instruction on.

*Something breaks inside of us.* Every window runs in a thread of its own, which no signal handler of Python's
interrupts, and whose end makes the kernel let go of whatever is still held: for the target, that is our death, which
is harmless (see above). In doubt the code ends that thread rather than try to repair.

*The bytes are wrong.* The stub copies exactly the bytes that the kernel says it moved, and only those, also when it
moved a part; with `verify`, it hashes each block before and after, inside the window. That neighbours are away at the
same time changes nothing: to the stub a run is one block, of the size of the scratch area at most, and whoever must
not see one block away must not see two. What is new is that a page may be refused when blocks before it were moved;
they are back in their place then, as the first part of a block is, and the others are moved again, alone.

*The order is wrong.* If the kernel has no folio of the enabled size, it falls back to smaller ones. The bytes are right
then, too, and the page tables show it (:func:`mthp.blockstates.shown`).

How long it takes is measured in every window, phase by phase, and the next window is filled accordingly
(:mod:`~mthp.linux.mover.pause`). What is fixed (stopping, parking, restoring) grows with the threads, some 20
microseconds each, nearly all of which the kernel takes for the dozen system calls (:mod:`~mthp.linux.mover.calls`).

What is not promised: references that the kernel cannot see as pins (pages in a pipe after vmsplice(2)); other processes
that write into the target at that moment (process_vm_writev(2), /proc/PID/mem); that an interrupted read or write which
had transferred a part goes on with the rest.
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
