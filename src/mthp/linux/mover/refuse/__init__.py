"""The refusals of the mover, each with its own reason.

The mover takes a page away from a program and puts the bytes into another page. Everything but the program's stopped
threads notices that: a device that writes to the page's physical address, an io_uring that remembers the page, a second
process in the same address space. The kernel itself refuses to move a page with a long-term pin. The other references
cannot be seen page by page, so a process that could have such a holder is refused as a whole.

Refusals come at three levels, from the largest to the smallest:

- :mod:`~mthp.linux.mover.refuse.process`, with its open files in :mod:`~mthp.linux.mover.refuse.devices`, other
  processes in its memory in :mod:`~mthp.linux.mover.refuse.sharing`, and its threads in
  :mod:`~mthp.linux.mover.refuse.threads`;
- :mod:`mthp.movechecks`: mappings;
- :mod:`~mthp.linux.mover.refuse.block`, with the large folios that cannot be split in
  :mod:`~mthp.linux.mover.refuse.pinned`.

:mod:`~mthp.linux.mover.recheck` checks again, after the stop, whatever can have changed.
"""
