"""The undo log of everything that mthp changes on a machine, and the process that carries it out when mthp dies.

:mod:`~mthp.linux.journal.switches` sets switches for a *window* and puts them back. It writes each change to
:mod:`~mthp.linux.journal.store` first. :mod:`~mthp.linux.journal.putback` undoes the changes there. A window ends
without its owner in three ways:

1. *The owner dies* (SIGKILL, the OOM killer). A watcher process, which :mod:`~mthp.linux.journal.guard` starts before
   the first change, sees the end of the owner's pidfd and puts everything back within milliseconds
   (:mod:`~mthp.linux.journal.watcher`).
2. *The owner is stopped* (SIGSTOP, a debugger). It holds the lock all the time, so the watcher puts its switches back
   without the lock. The owner finds the old words when it continues, and notices because it verifies the orders of
   folios after every batch.
3. *The watcher dies, too* (cgroup.kill, the end of a container). The next mthp that starts, or ``mthp doctor
   --restore``, finds the entries and puts everything back.

The modules that the watcher imports use the standard library alone, because the watcher must start quickly and stay
small: some 30 ms of processor time and 10 MB.
"""
