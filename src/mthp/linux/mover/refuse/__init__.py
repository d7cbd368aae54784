"""What the mover refuses, each with its own reason.

The mover takes a page away from under a program and puts the bytes back in another page. The program's own threads do
not notice, because they are stopped meanwhile. Everything else that refers to the page does: a device that writes to
its physical address, an io_uring that remembers the page and not its address, a second process that runs in the same
address space. The kernel itself refuses to move a page with a long-term pin. The rest cannot be seen page by page, so
a process that could have such a holder is refused as a whole. Other processes are refused because they cannot be
stopped, or because what the mover does inside of them would be seen or would kill them.

Refusals come at three levels, from the largest to the smallest:

- :mod:`~mthp.linux.mover.refuse.process`, with its open files in :mod:`~mthp.linux.mover.refuse.devices` and other
  processes in its memory in :mod:`~mthp.linux.mover.refuse.sharing`;
- :mod:`mthp.movechecks`: mappings;
- :mod:`~mthp.linux.mover.refuse.block`, with the large folios that cannot be split in
  :mod:`~mthp.linux.mover.refuse.pinned`.

What can have changed when the threads have been stopped is checked again by :mod:`~mthp.linux.mover.recheck`.
"""
