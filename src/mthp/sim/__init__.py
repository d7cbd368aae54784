"""A simulated machine: frames, address spaces, and the whole collapse path.

It is deterministic: the same calls lead to the same frames, counters and events on any machine
(:mod:`~mthp.sim.state` computes a checksum). The parts, from the bottom up:

- :mod:`~mthp.sim.frames`: frames and folios, the buddy allocator, the batch of the LRU lists, swap, cgroups;
- :mod:`~mthp.sim.mm`: address spaces as columns; :mod:`~mthp.sim.page_tables`: work on page tables;
- :mod:`~mthp.sim.allocation`: allocation of folios when memory is short or fragmented;
- :mod:`~mthp.sim.address_space`: accesses and system calls of programs;
- :mod:`~mthp.sim.collapse`: khugepaged and MADV_COLLAPSE;
- :mod:`~mthp.sim.clock`: simulated time; :mod:`~mthp.sim.sysfs`: the files of sysfs and ``/proc``;
- :mod:`~mthp.sim.golden`: recorded cases of real kernels, replayed on all of this.

:class:`~mthp.sim.machine.Machine` ties them together.
"""

from mthp.sim.machine import Machine
from mthp.sim.space import SimSpace

__all__ = ["Machine", "SimSpace"]
