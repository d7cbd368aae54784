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
     run of neighbours (:mod:`~mthp.linux.mover.adjacent`) the pages go to scratch memory (UFFDIO_MOVE), and copying the
     bytes back faults in a folio of the wanted order for each block;
   - all threads are restored and released (:mod:`~mthp.linux.mover.reentry`).

4. :mod:`~mthp.linux.mover.guarded`: a window of this process, in which no thread is stopped.

UFFDIO_MOVE (Linux 6.8) makes the kernel refuse pinned, shared and locked pages. Its destination has to be registered
with a userfaultfd; one that handles only faults of user mode can be created without privilege.

Why the target is safe: none of its threads runs while blocks are away, also new and exiting ones; what other processes
could do is refused beforehand; the userfaultfd exists only in the window, in which nothing can fork. Exactly the bytes
that the kernel reports as moved are copied back, and `verify` compares hashes. If the tracer dies, every thread
restores itself, at the cost of a due EINTR or a restarted timeout (:mod:`~mthp.linux.mover.park`). So in doubt the
mover ends the tracing thread and repairs nothing.

Not promised: references that the kernel cannot see as pins (pages in a pipe after vmsplice(2)); other processes that
write into the target at that moment (process_vm_writev(2), /proc/PID/mem); the rest of an interrupted read or write
that had transferred a part.
"""
